package main

import (
	"bytes"
	"io"
)

// skipWatcher passes on the output of tests and notes which were skipped.
type skipWatcher struct {
	w       io.Writer
	line    []byte   // the beginning of a line that is not complete
	skipped []string // names of tests
}

// Write implements io.Writer.
func (s *skipWatcher) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		line, after, complete := bytes.Cut(rest, []byte("\n"))
		s.line = append(s.line, line...)
		if complete {
			s.look()
			s.line = s.line[:0]
		}
		rest = after
	}
	return s.w.Write(p)
}

// look looks at a line: "--- SKIP: TestName (0.00s)", indented where it is a part of a test.
func (s *skipWatcher) look() {
	name, ok := bytes.CutPrefix(bytes.TrimLeft(s.line, " \t"), []byte("--- SKIP: "))
	if ok {
		name, _, _ = bytes.Cut(name, []byte(" "))
		s.skipped = append(s.skipped, string(name))
	}
}
