// Package testtree describes file trees in text, so that tests can compare a tree with what an
// image of it shows.
//
// A description is a list of [Entry], one a path. It comes from a real directory ([FromDir]),
// from text ([Parse]; testdata/README.md describes the format) or from the test itself, and
// [Diff] compares two of them. [UnpackTar] makes a real directory of a golden tree. The package
// is for tests only and knows no image.
package testtree

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/hex"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Type is the type of a path, as the text form spells it.
type Type string

// The types.
const (
	Dir     Type = "dir"
	File    Type = "file"
	Symlink Type = "link"
	Fifo    Type = "fifo"
	Socket  Type = "sock"
	Char    Type = "chr"
	Block   Type = "blk"
)

// Entry describes one path. Fields that do not apply to the Type are zero.
type Entry struct {
	// Path begins with a slash, which stands for the root of the tree. Its bytes are those of
	// the file system, whatever their encoding.
	Path string
	Type Type
	// Perm is st_mode & 07777.
	Perm     uint16
	UID, GID uint32
	// Size, in bytes, SHA256, in hexadecimal, and Nlink are a File's.
	Size   int64
	SHA256 string
	Nlink  uint64
	// Major and Minor are the device numbers of a Char or Block.
	Major, Minor uint32
	// Target is a Symlink's.
	Target string
	// Xattrs is sorted by key.
	Xattrs []Xattr
}

// Xattr is an extended attribute with its full name.
type Xattr struct {
	Key   string
	Value []byte
}

// line matches a line of the text form. The path ends at the first place where something that
// looks like type, mode and owner follows; escapePath sees to it that no path contains that.
var line = regexp.MustCompile(`^(/.*?) (dir|file|link|fifo|sock|chr|blk) ([0-7]{4}) ([0-9]+):([0-9]+)(?: (.*))?$`)

// ambiguous matches what a path must not contain unescaped.
var ambiguous = regexp.MustCompile(` (dir|file|link|fifo|sock|chr|blk) [0-7]{4} [0-9]+:[0-9]+( |$)`)

// attrMark separates a line's detail from its xattrs, and those from each other.
const attrMark = " xattr:"

// emptyValue stands for the value of an xattr that has none.
const emptyValue = "(empty)"

// Parse reads the text form. It keeps the order of the lines and checks nothing beyond a
// line's syntax.
func Parse(txt io.Reader) ([]Entry, error) {
	var entries []Entry
	sc := bufio.NewScanner(txt)
	sc.Buffer(nil, 1<<20) // a path, a target and some xattrs of 64 KiB, twice that in hexadecimal
	for n := 1; sc.Scan(); n++ {
		e, err := parseLine(sc.Text())
		if err != nil {
			return nil, fmt.Errorf("parse line %d of the tree's description: %w", n, err)
		}
		entries = append(entries, e)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read the tree's description: %w", err)
	}
	return entries, nil
}

// Format writes the text form, a line an entry, in the order of the entries.
func Format(entries []Entry) []byte {
	var buf bytes.Buffer
	for i := range entries {
		formatLine(&buf, &entries[i])
		buf.WriteByte('\n')
	}
	return buf.Bytes()
}

// Sort sorts entries by the bytes of their paths, the order of the golden trees.
func Sort(entries []Entry) {
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Path, b.Path) })
}

// Diff compares two trees whatever the order of their entries. It returns "" when they are
// equal, else the lines that are only in want, marked "-", and only in got, marked "+", those of
// a path next to each other, and no more than a screen of them.
func Diff(want, got []Entry) string {
	const most = 40
	w, g := sortedLines(want), sortedLines(got)
	var out strings.Builder
	lines := 0
	put := func(mark string, l diffLine) {
		if lines++; lines <= most {
			fmt.Fprintf(&out, "%s%s\n", mark, l.text)
		}
	}
	for len(w) > 0 || len(g) > 0 {
		c := 0
		switch {
		case len(w) == 0:
			c = 1
		case len(g) == 0:
			c = -1
		default:
			c = compareLines(w[0], g[0])
		}
		if c < 0 {
			put("-", w[0])
			w = w[1:]
		} else if c > 0 {
			put("+", g[0])
			g = g[1:]
		} else {
			w, g = w[1:], g[1:]
		}
	}
	if lines > most {
		fmt.Fprintf(&out, "… and %d more lines\n", lines-most)
	}
	if lines == 0 {
		return ""
	}
	return fmt.Sprintf("trees differ (-want +got; %d and %d paths):\n%s", len(want), len(got), out.String())
}

// diffLine is a line with the path that it is about.
type diffLine struct{ path, text string }

func compareLines(a, b diffLine) int {
	return cmp.Or(cmp.Compare(a.path, b.path), cmp.Compare(a.text, b.text))
}

func sortedLines(entries []Entry) []diffLine {
	lines := make([]diffLine, 0, len(entries))
	var buf bytes.Buffer
	for i := range entries {
		buf.Reset()
		formatLine(&buf, &entries[i])
		lines = append(lines, diffLine{entries[i].Path, buf.String()})
	}
	slices.SortFunc(lines, compareLines)
	return lines
}

func parseLine(s string) (Entry, error) {
	m := line.FindStringSubmatch(s)
	if m == nil {
		return Entry{}, fmt.Errorf("%q: want PATH TYPE MODE UID:GID", s)
	}
	e := Entry{Type: Type(m[2])}
	var p fieldParser
	e.Path = p.unescape(m[1])
	e.Perm = uint16(p.uint(m[3], 8, 12))
	e.UID = uint32(p.uint(m[4], 10, 32))
	e.GID = uint32(p.uint(m[5], 10, 32))
	detail, attrs, hasAttrs := strings.Cut(m[6], attrMark)
	if hasAttrs {
		for a := range strings.SplitSeq(attrs, attrMark) {
			e.Xattrs = append(e.Xattrs, p.xattr(a))
		}
	}
	p.detail(&e, detail)
	if p.err != nil {
		return Entry{}, fmt.Errorf("%q: %w", s, p.err)
	}
	return e, nil
}

// fieldParser parses the fields of a line and keeps the first error.
type fieldParser struct{ err error }

func (p *fieldParser) fail(err error) {
	if p.err == nil {
		p.err = err
	}
}

func (p *fieldParser) uint(s string, base, bits int) uint64 {
	v, err := strconv.ParseUint(s, base, bits)
	if err != nil {
		p.fail(err)
	}
	return v
}

func (p *fieldParser) unescape(s string) string {
	v, err := unescape(s)
	if err != nil {
		p.fail(err)
	}
	return v
}

func (p *fieldParser) xattr(s string) Xattr {
	key, value, ok := strings.Cut(s, "=")
	if !ok || value == "" {
		p.fail(fmt.Errorf("xattr %q: want KEY=HEX or KEY=%s", s, emptyValue))
	}
	x := Xattr{Key: p.unescape(key), Value: []byte{}}
	if value == emptyValue {
		return x
	}
	var err error
	if x.Value, err = hex.DecodeString(value); err != nil {
		p.fail(fmt.Errorf("xattr %q: %w", s, err))
	}
	return x
}

func (p *fieldParser) detail(e *Entry, s string) {
	wrong := func(want string) { p.fail(fmt.Errorf("detail %q of a %s: want %s", s, e.Type, want)) }
	switch e.Type {
	case File:
		f := strings.Split(s, " ")
		if len(f) != 3 || !strings.HasPrefix(f[0], "size=") || !strings.HasPrefix(f[1], "sha256=") || !strings.HasPrefix(f[2], "nlink=") {
			wrong("size=BYTES sha256=HEX nlink=N")
			return
		}
		e.Size = int64(p.uint(f[0][len("size="):], 10, 63))
		e.SHA256 = f[1][len("sha256="):]
		e.Nlink = p.uint(f[2][len("nlink="):], 10, 64)
	case Symlink:
		target, ok := strings.CutPrefix(s, "-> ")
		if !ok {
			wrong("-> TARGET")
			return
		}
		e.Target = p.unescape(target)
	case Char, Block:
		major, minor, ok := strings.Cut(strings.TrimPrefix(s, "rdev="), ":")
		if !ok || !strings.HasPrefix(s, "rdev=") {
			wrong("rdev=MAJOR:MINOR")
			return
		}
		e.Major, e.Minor = uint32(p.uint(major, 10, 32)), uint32(p.uint(minor, 10, 32))
	case Dir, Fifo, Socket:
		if s != "" {
			wrong("nothing")
		}
	}
}

func formatLine(buf *bytes.Buffer, e *Entry) {
	fmt.Fprintf(buf, "%s %s %04o %d:%d", escapePath(e.Path), e.Type, e.Perm, e.UID, e.GID)
	switch e.Type {
	case File:
		fmt.Fprintf(buf, " size=%d sha256=%s nlink=%d", e.Size, e.SHA256, e.Nlink)
	case Symlink:
		fmt.Fprintf(buf, " -> %s", escapeTarget(e.Target))
	case Char, Block:
		fmt.Fprintf(buf, " rdev=%d:%d", e.Major, e.Minor)
	case Dir, Fifo, Socket:
		if len(e.Xattrs) > 0 {
			buf.WriteByte(' ') // separates a detail that is empty
		}
	}
	for _, x := range e.Xattrs {
		value := emptyValue
		if len(x.Value) > 0 {
			value = hex.EncodeToString(x.Value)
		}
		fmt.Fprintf(buf, "%s%s=%s", attrMark, escapeKey(x.Key), value)
	}
}
