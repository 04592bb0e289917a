package verity

import "golang.org/x/sys/cpu"

// hasLanes reports whether the CPU, and the kernel, have what blocks16 needs.
var hasLanes = cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW

// blocks16 runs the next n blocks, of 64 bytes, of each stream through its lane of the state.
//
//go:noescape
func blocks16(s *state, streams *[lanes]*byte, n int)
