package builder

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Tree is a tree that was read from an archive or a container image, ready to be built from
// any number of times. The names and attributes are in memory, about 400 bytes each, the
// content of files is in a temporary file without a name. It must be closed.
type Tree struct {
	name  string
	root  *node
	spool *spool
}

// ReadConfig says how to read a tree.
type ReadConfig struct {
	// Name is what to call the source in messages.
	Name string
	// WorkDir is the directory for the temporary file, which needs room for the content of all
	// files; "" means os.TempDir.
	WorkDir string
	// Warn, if not nil, is called with a sentence for the user about what the source has and
	// an image cannot.
	Warn func(message string)
}

// readTree makes a tree of what read reads.
func readTree(ctx context.Context, cfg ReadConfig, read func(*archive, *node) error) (*Tree, error) {
	sp, err := newSpool(ctx, cfg.WorkDir)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", cfg.Name, err)
	}
	a := &archive{ctx: ctx, t: newMemTree(sp), warn: cfg.Warn}
	root, err := a.t.newDir()
	if err == nil {
		err = read(a, root)
	}
	if err == nil {
		err = sp.finish()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", cfg.Name, err), sp.close())
	}
	return &Tree{name: cfg.Name, root: root, spool: sp}, nil
}

// open returns the root directory.
func (t *Tree) open() directory { return &memDir{n: t.root, spool: t.spool} }

// Close releases the temporary file. No build of the tree may be under way.
func (t *Tree) Close() error { return t.spool.close() }

// directory is a directory of a tree, open for the walker. What a file is called, and what it
// is, comes from here; which number it gets is the walker's. That is why the same tree
// gives the same image whatever it comes from.
type directory interface {
	// path returns the directory's own, for messages. It may be called after close.
	path() string
	// self returns what the directory is itself, and its extended attributes.
	self() (attr, details, error)
	// names returns the names in the directory, in byte order.
	names() ([]string, error)
	// stat looks at a name. It is for the names in their order.
	stat(name string) (attr, error)
	// open opens the regular file that a is about, and updates a.size.
	open(name string, a *attr) (io.ReadCloser, error)
	// details returns the rest of what is known of a name. file is what open returned for it,
	// or nil if it was not opened.
	details(name string, a *attr, file io.ReadCloser) (details, error)
	// soon says which subdirectories are entered next, in this order, and nothing else before. The caller
	// leaves dirs as it is until the directory is closed.
	soon(dirs []child)
	// enter opens the subdirectory that a is about.
	enter(name string, a *attr) (directory, error)
	// close releases the directory.
	close() error
}

// fileID tells the files of a tree apart.
type fileID struct{ dev, ino uint64 }

// attr is what is known of a file without opening it.
type attr struct {
	kind         format.Kind
	perm         uint16
	mount        bool // a directory that another file system is mounted on: it stays empty
	uid, gid     uint32
	major, minor uint32
	size         int64
	// id and links say which names are links to one file: those of equal id, where links,
	// the number of them in and out of the tree, is over 1.
	id    fileID
	links uint64
	// state is for files of this host.
	state fileState
}

// details is what takes further system calls to find out.
type details struct {
	target []byte         // of a symlink
	xattrs []format.Xattr // sorted by key
}
