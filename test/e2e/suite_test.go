package e2e_test

import "testing"

// parts is the suite, in order. The order matters: all parts share one installation of the driver, and
// one registry, because installing costs more than most of what is tested; so what may break the
// installation comes after what needs it whole, and the quick start, which installs by itself, comes last.
// Each part can also run alone, as in go test -run 'TestSuite/volumes$': what it needs from those before
// it, it makes when it is not there.
//
// The parts takeover, node and eviction end processes of a node, and node restarts kubelet and the node
// itself, which takes a control of the machines that the API server does not give (E2E_MACHINES).
func (s *suite) parts() []part {
	return []part{}
}

// part is a function that tests one thing that users are promised.
type part struct {
	name string
	test func(t *testing.T)
}

// suite is what all parts share.
type suite struct{}

// TestSuite runs all parts.
func TestSuite(t *testing.T) {
	s := &suite{}
	for _, p := range s.parts() {
		t.Run(p.name, p.test)
	}
}
