package testtree

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// escape makes s fit into a line: newline as \n, backslash doubled, other control characters
// and bytes that are not UTF-8 as \xff. Everything else stands for itself.
func escape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\\':
			b.WriteString(`\\`)
		case r == utf8.RuneError && size == 1, r < ' ', r == 0x7f:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		default:
			b.WriteString(s[i : i+size])
		}
		i += size
	}
	return b.String()
}

// spaces escapes the spaces of a text that is escaped already.
func spaces(escaped string) string { return strings.ReplaceAll(escaped, " ", `\x20`) }

// escapePath escapes a path; its spaces too where they would be taken for the line's own.
func escapePath(path string) string {
	s := escape(path)
	if ambiguous.MatchString(s) {
		return spaces(s)
	}
	return s
}

// escapeTarget escapes a symlink's target; its spaces too where an xattr would be seen in it.
func escapeTarget(target string) string {
	s := escape(target)
	if strings.Contains(s, attrMark) {
		return spaces(s)
	}
	return s
}

// escapeKey escapes the name of an xattr.
func escapeKey(key string) string {
	return strings.ReplaceAll(spaces(escape(key)), "=", `\x3d`)
}

// unescape is the inverse of all of the above.
func unescape(s string) (string, error) {
	var b strings.Builder
	for {
		plain, rest, found := strings.Cut(s, `\`)
		b.WriteString(plain)
		if !found {
			return b.String(), nil
		}
		switch {
		case strings.HasPrefix(rest, "n"):
			b.WriteByte('\n')
			s = rest[1:]
		case strings.HasPrefix(rest, `\`):
			b.WriteByte('\\')
			s = rest[1:]
		case strings.HasPrefix(rest, "x") && len(rest) >= 3:
			v, err := strconv.ParseUint(rest[1:3], 16, 8)
			if err != nil {
				return "", fmt.Errorf(`escape \%s: %w`, rest[:3], err)
			}
			b.WriteByte(byte(v))
			s = rest[3:]
		default:
			return "", fmt.Errorf(`a backslash must begin \n, \\ or \xHH`)
		}
	}
}
