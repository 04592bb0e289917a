package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/kube/upstream/cases"
)

// writeReport writes a line of JSON for each result.
func writeReport(file string, results []cases.Result) error {
	var b bytes.Buffer
	lines := json.NewEncoder(&b)
	lines.SetEscapeHTML(false)
	for _, r := range results {
		if err := lines.Encode(r); err != nil {
			return fmt.Errorf("write report: %w", err)
		}
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}
