package format

// ParseAny is ParseManifest without what reads the canonical form faster.
func ParseAny(b []byte) (*Manifest, error) { return parseAny(b) }

// IsCanonical reports whether b is a manifest that is read faster.
func IsCanonical(b []byte) bool { return parseCanonical(b) != nil }

// DecodeAnyRootfs is DecodeRootfs without what decodes the usual form faster.
func DecodeAnyRootfs(b []byte) (*Rootfs, error) { return new(Limits).decodeRootfs(b) }

// DecodeQuickly is what decodes the usual form faster.
func DecodeQuickly(b []byte) (*Rootfs, bool) { return quickRootfs(b, new(Limits)) }

// EncodeWithin is EncodeRootfs with an arena for so many words.
func EncodeWithin(words int, r *Rootfs) ([]byte, error) {
	return newMessage(words).rootfs(r.pieces(), r.Verity)
}
