package record

import (
	"context"
	"io"
)

// For tests.
var (
	Normalize = normalize
	Fill      = fill
)

// Cut is what a step shows of an output.
func (s *Step) Cut(output string) string { return s.cut(output) }

// Env is what makes programs find the registry.
func (r *Registry) Env(caFile, noProxy string) []string { return r.env(caFile, noProxy) }

// Certificate is that of the registry's authority.
func (r *Registry) Certificate() []byte { return r.certificate }

// Run records a session of text, with the environment of the test.
func Run(ctx context.Context, text, dir string, progress io.Writer) (*Recording, error) {
	session, err := ParseSession(text)
	if err != nil {
		return nil, err
	}
	return record(ctx, session, shell{dir: dir, env: environment(dir, "", nil), progress: progress}, map[string]string{})
}
