package format

// ParseAny is ParseManifest without what reads the canonical form faster.
func ParseAny(b []byte) (*Manifest, error) { return parseAny(b) }

// IsCanonical reports whether b is a manifest that is read faster.
func IsCanonical(b []byte) bool { return parseCanonical(b) != nil }
