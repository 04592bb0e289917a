package format

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// DigestPrefix is the algorithm prefix of the text form of a [Digest].
const DigestPrefix = "sha256:"

// Digest is the SHA-256 of a blob's stored bytes: the name of the blob.
// It is a comparable value; the zero Digest stands for "none".
type Digest [sha256.Size]byte

// DigestOf returns the digest of b.
func DigestOf(b []byte) Digest { return sha256.Sum256(b) }

// ParseDigest parses "sha256:" followed by 64 lower-case hexadecimal digits.
// Other algorithms are refused: PuzzleFS images use SHA-256 only.
func ParseDigest(s string) (Digest, error) {
	h, ok := strings.CutPrefix(s, DigestPrefix)
	if !ok {
		return Digest{}, fmt.Errorf("parse digest %q: want sha256:<64 hex digits>: %w", shorten(s), ErrCorrupt)
	}
	return ParseHex(h)
}

// ParseHex parses 64 lower-case hexadecimal digits, the file name of a blob in an OCI
// layout. It never returns the zero Digest without an error.
func ParseHex(s string) (Digest, error) {
	var d Digest
	if len(s) != hex.EncodedLen(len(d)) || strings.ToLower(s) != s {
		return Digest{}, fmt.Errorf("parse digest %q: want 64 lower-case hex digits: %w", shorten(s), ErrCorrupt)
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil {
		return Digest{}, fmt.Errorf("parse digest %q: want 64 lower-case hex digits: %w", shorten(s), ErrCorrupt)
	}
	if d.IsZero() {
		// Nothing known has it, and it must not be taken for the absence of a digest.
		return Digest{}, fmt.Errorf("parse digest %q: only zeros name nothing: %w", s, ErrCorrupt)
	}
	return d, nil
}

// String returns the OCI form, "sha256:<hex>".
func (d Digest) String() string { return DigestPrefix + d.Hex() }

// Hex returns the 64 hexadecimal digits without the algorithm.
func (d Digest) Hex() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether d is the zero Digest, which names no blob.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText returns the OCI form.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText parses the OCI form.
func (d *Digest) UnmarshalText(b []byte) error {
	v, err := ParseDigest(string(b))
	if err != nil {
		return err
	}
	*d = v
	return nil
}

// shorten keeps hostile text in error messages to a readable length.
func shorten(s string) string {
	const most = 100
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
