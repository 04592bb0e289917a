//go:build !amd64

package verity

// hasLanes says that blocks are hashed one after the other: on arm64 the SHA-256 instructions are not
// waiting for one another as on amd64.
const hasLanes = false

func blocks16(*state, *[lanes]*byte, int) { panic("verity: no lanes") }
