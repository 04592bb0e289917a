package builder

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// Pattern says which paths of a tree to leave out. Its syntax is that of a line of .dockerignore:
// it is matched against whole paths from the root of the tree, element by element. In an
// element * stands for any bytes, ? for one character and [a-z] for one of several, as in
// path.Match; a backslash takes their meaning away. The element ** stands for any number
// of elements, none included, and at the end of a pattern for one or more. What is below a path
// that matches is left out with it.
//
// Not taken from .dockerignore: exceptions (a pattern that begins with an exclamation mark), and
// ** as a part of an element.
type Pattern struct{ elements []string }

// anyDepth is the element that stands for any number of elements.
const anyDepth = "**"

// ParsePattern makes sense of a pattern. A slash at the beginning or the end means nothing.
// It fails with ErrConfig.
func ParsePattern(text string) (Pattern, error) {
	wrong := func(why string) (Pattern, error) {
		return Pattern{}, fmt.Errorf("pattern %q: %s: %w", text, why, ErrConfig)
	}
	if strings.HasPrefix(text, "!") {
		return wrong(`exceptions are not possible; a name that begins with ! is written \!`)
	}
	if strings.IndexByte(text, 0) >= 0 {
		return wrong("no name has a NUL")
	}
	var p Pattern
	for element := range strings.SplitSeq(text, "/") {
		switch {
		case element == "" || element == ".":
			continue
		case element == "..":
			return wrong("it leads out of the tree")
		case element == anyDepth && len(p.elements) > 0 && p.elements[len(p.elements)-1] == anyDepth:
			continue // which is no more than one
		case element != anyDepth && strings.Contains(strings.ReplaceAll(element, `\*`, ""), anyDepth):
			return wrong("** stands between slashes")
		}
		if _, err := path.Match(element, ""); err != nil {
			return wrong("a bracket is not closed, or nothing follows a backslash")
		}
		p.elements = append(p.elements, element)
	}
	if len(p.elements) == 0 {
		return wrong("it names the root of the tree, or nothing")
	}
	return p, nil
}

// String returns the pattern in the one form that all spellings of it have.
func (p Pattern) String() string { return strings.Join(p.elements, "/") }

// match reports whether a path, given by its elements, matches. After a ** that matched too
// little it goes back to the last one only, so that no pattern takes long.
func (p Pattern) match(names []string) bool {
	at, name := 0, 0
	star, starName := -1, 0
	for name < len(names) {
		if at < len(p.elements) && p.elements[at] == anyDepth {
			star, starName = at, name
			at++
			continue
		}
		if at < len(p.elements) {
			// The syntax was checked, so there is no other error.
			if ok, _ := path.Match(p.elements[at], names[name]); ok {
				at++
				name++
				continue
			}
		}
		if star < 0 {
			return false
		}
		starName++
		at, name = star+1, starName
	}
	return at == len(p.elements)
}

// excluded reports whether any of the patterns matches.
func excluded(patterns []Pattern, names []string) bool {
	return slices.ContainsFunc(patterns, func(p Pattern) bool { return p.match(names) })
}
