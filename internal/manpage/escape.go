package manpage

import (
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// escape makes text that stands for itself: what roff would take for its own, the characters that
// it turns into typographic ones, and all that is not ASCII.
func escape(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch r {
		case '\\':
			b.WriteString(`\e`)
		case '-':
			b.WriteString(`\-`)
		case '\'':
			b.WriteString(`\(aq`)
		case '`':
			b.WriteString(`\(ga`)
		case '^':
			b.WriteString(`\(ha`)
		case '~':
			b.WriteString(`\(ti`)
		default:
			if r < utf8.RuneSelf {
				b.WriteRune(r)
			} else {
				fmt.Fprintf(&b, `\[u%04X]`, r)
			}
		}
	}
	return b.String()
}

// flagWord is a flag in a text.
var flagWord = regexp.MustCompile(`(^|[ (\[|'])(--?[a-z][a-z-]*)`)

// flags escapes a text and makes the flags in it bold.
func flags(s string) string {
	var b strings.Builder
	for {
		m := flagWord.FindStringSubmatchIndex(s)
		if m == nil {
			return b.String() + escape(s)
		}
		b.WriteString(escape(s[:m[4]]))
		b.WriteString(`\fB` + escape(s[m[4]:m[5]]) + `\fR`)
		s = s[m[5]:]
	}
}
