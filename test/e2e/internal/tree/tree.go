// Package tree describes file trees in text: of a volume inside a pod, and of the directory that its
// image was made of on the machine where the suite runs. What is compared has been described by the
// same code in both places.
//
// It is package testtree with what that leaves out: which names are links to the same file.
package tree

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"golang.org/x/sys/unix"
)

// Tree describes a tree.
type Tree struct {
	// Entries are all paths of it, sorted.
	Entries []testtree.Entry
	// Links are the groups of paths, relative to the tree and with a slash before them as those of
	// the entries, that are names of one file. A group has two or more, sorted; groups are sorted by
	// their first.
	Links [][]string
}

// linksMark begins the line of a group of links. No line of an entry does: that begins with a slash.
const linksMark = "links:"

// Describe describes the tree at dir: type, mode, owner, size, content, target, device numbers,
// number of links and extended attributes of every path. Symlinks are not followed, mount points are
// crossed. It is an error when something cannot be read.
func Describe(dir string) (Tree, error) {
	entries, err := testtree.FromDir(dir)
	if err != nil {
		return Tree{}, err
	}
	type inode struct{ dev, ino uint64 }
	names := make(map[inode][]string)
	for _, e := range entries {
		if e.Type == testtree.Dir {
			continue
		}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, e.Path), &st); err != nil {
			return Tree{}, fmt.Errorf("describe %s in %s: lstat: %w", e.Path, dir, err)
		}
		id := inode{st.Dev, st.Ino}
		names[id] = append(names[id], e.Path)
	}
	t := Tree{Entries: entries}
	for group := range maps.Values(names) {
		if len(group) > 1 {
			t.Links = append(t.Links, group)
		}
	}
	slices.SortFunc(t.Links, func(a, b []string) int { return cmp.Compare(a[0], b[0]) })
	return t, nil
}

// Format writes the text form: a line for each path, as testtree writes it, then one for each group
// of links, with quoted paths:
//
//	/a file 0644 0:0 size=5 sha256=2cf24d… nlink=2
//	/b file 0644 0:0 size=5 sha256=2cf24d… nlink=2
//	links: "/a" "/b"
func (t Tree) Format() []byte {
	text := bytes.NewBuffer(testtree.Format(t.Entries))
	for _, group := range t.Links {
		text.WriteString(linksLine(group) + "\n")
	}
	return text.Bytes()
}

func linksLine(group []string) string {
	line := linksMark
	for _, path := range group {
		line += " " + strconv.QuoteToASCII(path)
	}
	return line
}

// Parse reads the text form.
func Parse(r io.Reader) (Tree, error) {
	text, err := io.ReadAll(r)
	if err != nil {
		return Tree{}, fmt.Errorf("read the tree's description: %w", err)
	}
	var t Tree
	var entries bytes.Buffer
	for line := range bytes.Lines(text) {
		group, ok := strings.CutPrefix(strings.TrimSuffix(string(line), "\n"), linksMark)
		if !ok {
			entries.Write(line)
			continue
		}
		paths, err := parseLinks(group)
		if err != nil {
			return Tree{}, fmt.Errorf("parse a line of links in the tree's description: %q: %w", line, err)
		}
		t.Links = append(t.Links, paths)
	}
	t.Entries, err = testtree.Parse(&entries)
	return t, err
}

func parseLinks(group string) ([]string, error) {
	var paths []string
	for group != "" {
		quoted, err := strconv.QuotedPrefix(strings.TrimPrefix(group, " "))
		if err != nil {
			return nil, err
		}
		path, err := strconv.Unquote(quoted)
		if err != nil {
			return nil, err
		}
		paths = append(paths, path)
		group = strings.TrimPrefix(group, " ")[len(quoted):]
	}
	if len(paths) < 2 {
		return nil, fmt.Errorf("want two paths or more")
	}
	return paths, nil
}

// Diff returns "" for equal trees, else what differs, in lines marked "-" for what is only in want
// and "+" for what is only in got.
func Diff(want, got Tree) string {
	diff := testtree.Diff(want.Entries, got.Entries)
	w, g := groups(want), groups(got)
	for _, line := range slices.Sorted(maps.Keys(w)) {
		if !g[line] {
			diff += "-" + line + "\n"
		}
	}
	for _, line := range slices.Sorted(maps.Keys(g)) {
		if !w[line] {
			diff += "+" + line + "\n"
		}
	}
	return diff
}

func groups(t Tree) map[string]bool {
	lines := make(map[string]bool)
	for _, group := range t.Links {
		lines[linksLine(group)] = true
	}
	return lines
}
