package builder

import (
	"cmp"
	"context"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// SpoolBlocks returns the disk space of the content of a tree, in bytes.
func SpoolBlocks(t testing.TB, tree *Tree) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(tree.spool.f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// BuildUpperOf builds from an upper directory that is made of any bytes: whatever an overlay may
// leave and may not, but for the content of files.
func BuildUpperOf(ctx context.Context, cfg Config, names, targets []string, b []byte) (*Result, error) {
	base, err := baseOf(ctx, &cfg)
	if err != nil {
		return nil, err
	}
	next := func() int {
		if len(b) == 0 {
			return 0
		}
		v := b[0]
		b = b[1:]
		return int(v)
	}
	root := &upperNode{attr: attr{kind: format.KindDir, perm: 0o755}}
	dirs := []*upperNode{root}
	marks := []string{"opaque", "redirect", "metacopy", "nlink", "origin", "whiteout", "impure"}
	values := append([]string{"y", "x", "", "U+0", "U+1", "U-1", "L+0"}, targets...)
	for len(b) > 0 {
		n := &upperNode{name: names[next()%len(names)], parent: dirs[next()%len(dirs)]}
		n.attr = attr{kind: format.KindFile, perm: 0o644, id: fileID{ino: uint64(next() % 8)}, links: uint64(next() % 4)}
		switch next() % 4 {
		case 0:
			n.kind, n.id.ino = format.KindDir, uint64(len(b)+8)
		case 1:
			n.whiteout = true
		}
		for range next() % 3 {
			key, val := marks[next()%len(marks)], values[next()%len(values)]
			n.xattrs = append(n.xattrs, format.Xattr{Key: []byte(overlayTrusted + key), Val: []byte(val)})
			if key == "metacopy" && n.kind == format.KindFile {
				n.size = int64(len("content"))
			}
		}
		if n.parent.child(n.name) != nil {
			continue
		}
		n.parent.children = append(n.parent.children, n)
		slices.SortFunc(n.parent.children, func(a, b *upperNode) int { return cmp.Compare(a.name, b.name) })
		if n.kind == format.KindDir && !n.whiteout {
			dirs = append(dirs, n)
		}
	}
	if err := root.interpretRoot(overlayTrusted); err != nil {
		return nil, err
	}
	return buildUpperNodes(ctx, &cfg, base, func(*walker) (*upperNode, directory, error) { return root, nil, nil })
}

// Later returns c for a build that takes what was changed just now for settled.
func Later(c Config) Config {
	c.now = time.Now().Add(time.Hour)
	return c
}

// Compressor returns what compresses chunks. What it returns is valid until the next call.
func Compressor(tb testing.TB, level CompressionLevel) func(data []byte) []byte {
	tb.Helper()
	c, err := newCompressor(level)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.close)
	return func(data []byte) []byte {
		b, err := c.compress(data)
		if err != nil {
			tb.Fatal(err)
		}
		return b
	}
}
