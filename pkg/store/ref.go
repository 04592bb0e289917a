package store

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxTagLen is the length of the longest tag, in bytes. Tools exist that use whole registry
// references as tags, so it is more than a registry allows.
const MaxTagLen = 1024

// SplitRef splits LAYOUT:TAG, as the command line takes it, at the last colon. Neither part
// may be empty and the tag must be one that ValidateTag accepts; the directory is not
// looked at. It fails with ErrInvalidTag.
func SplitRef(s string) (dir, tag string, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", "", fmt.Errorf("parse %q: want LAYOUT:TAG, a directory and a tag with a colon between: %w", s, ErrInvalidTag)
	}
	dir, tag = s[:i], s[i+1:]
	if dir == "" {
		return "", "", fmt.Errorf("parse %q: want LAYOUT:TAG, there is no directory before the last colon: %w", s, ErrInvalidTag)
	}
	if err := ValidateTag(tag); err != nil {
		return "", "", fmt.Errorf("parse %q: want LAYOUT:TAG: %w", s, err)
	}
	return dir, tag, nil
}

// ValidateTag says whether tag can name an image in a layout: 1 to MaxTagLen bytes of UTF-8
// without control characters. It fails with ErrInvalidTag.
func ValidateTag(tag string) error {
	switch {
	case tag == "":
		return fmt.Errorf("the tag is empty: %w", ErrInvalidTag)
	case len(tag) > MaxTagLen:
		return fmt.Errorf("the tag has %d bytes, at most %d are allowed: %w", len(tag), MaxTagLen, ErrInvalidTag)
	case !utf8.ValidString(tag):
		return fmt.Errorf("the tag %q is not UTF-8: %w", tag, ErrInvalidTag)
	case strings.ContainsFunc(tag, unicode.IsControl):
		return fmt.Errorf("the tag %q has control characters: %w", tag, ErrInvalidTag)
	}
	return nil
}
