package builder

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Minimal says what of a tree does not go into an image. The zero Minimal keeps everything, and only
// then has the image the digest that the reference gives. The image's manifest names what
// was used, see [AnnotationMinimal].
//
// In a build from an overlay's upper directory it is about what that has. The rest of the image
// is the base's as it is, and so is what the base has at a path that Exclude matches.
type Minimal struct {
	// NoXattrs leaves out all extended attributes, access control lists and file
	// capabilities included.
	NoXattrs bool
	// NoDevices leaves out character and block devices. Fifos and sockets stay: whoever may
	// write to a directory can make those.
	NoDevices bool
	// Owner, if not nil, is the owner of every file.
	Owner *Owner
	// Exclude leaves out what any of the patterns matches.
	Exclude []Pattern
}

// Owner is a user and a group, by number.
type Owner struct{ UID, GID uint32 }

// ParseOwner makes sense of UID:GID, two decimal numbers up to 4294967294. It fails with ErrConfig.
func ParseOwner(text string) (Owner, error) {
	user, group, ok := strings.Cut(text, ":")
	uid, err := strconv.ParseUint(user, 10, 32)
	gid, err2 := strconv.ParseUint(group, 10, 32)
	// The largest number means "do not change" to chown(2), and nobody can have it.
	if !ok || err != nil || err2 != nil || uid == math.MaxUint32 || gid == math.MaxUint32 {
		return Owner{}, fmt.Errorf("owner %q: want UID:GID, two numbers up to %d: %w", text, uint32(math.MaxUint32-1), ErrConfig)
	}
	return Owner{uint32(uid), uint32(gid)}, nil
}

// AnnotationMinimal is the annotation of an image manifest that says what was left out of the image, as a JSON
// list of objects without white space:
//
//	[{"exclude":["**/*.pyc","var/cache"],"noDevices":true,"noXattrs":true,"owner":"0:0"}]
//
// Keys are sorted, those without effect are left out, and the patterns of exclude are in their one form,
// sorted and without repetition. There is one object; after builds from upper directories of
// overlays there is one for each of the builds that the image's files come from, oldest
// first, without those that left nothing out and without repetition. An image that nothing was
// left out of has no such annotation.
const AnnotationMinimal = "io.puzzlefs.csi.minimal"

// minimalJSON is one object of the annotation. Its fields are in the order of their names.
type minimalJSON struct {
	Exclude   []string `json:"exclude,omitempty"`
	NoDevices bool     `json:"noDevices,omitempty"`
	NoXattrs  bool     `json:"noXattrs,omitempty"`
	Owner     string   `json:"owner,omitempty"`
}

// isZero reports whether nothing is left out.
func (m *Minimal) isZero() bool {
	return !m.NoXattrs && !m.NoDevices && m.Owner == nil && len(m.Exclude) == 0
}

// encode returns the object of the annotation.
func (m *Minimal) encode() (json.RawMessage, error) {
	out := minimalJSON{NoDevices: m.NoDevices, NoXattrs: m.NoXattrs}
	for _, p := range m.Exclude {
		out.Exclude = append(out.Exclude, p.String())
	}
	slices.Sort(out.Exclude)
	out.Exclude = slices.Compact(out.Exclude)
	if m.Owner != nil {
		out.Owner = fmt.Sprintf("%d:%d", m.Owner.UID, m.Owner.GID)
	}
	return format.CanonicalJSON(&out)
}

// annotation returns the value of the annotation; "" where there is to be none. inherited is
// the value that the base has, where files of it are files of the image.
func (m *Minimal) annotation(inherited string) (string, error) {
	if m.isZero() {
		return inherited, nil
	}
	var builds []json.RawMessage
	if inherited != "" {
		if err := json.Unmarshal([]byte(inherited), &builds); err != nil {
			return "", fmt.Errorf("the base image's annotation %s: %w: %w", AnnotationMinimal, err, format.ErrCorrupt)
		}
	}
	own, err := m.encode()
	if err != nil {
		return "", err
	}
	if !slices.ContainsFunc(builds, func(b json.RawMessage) bool { return string(b) == string(own) }) {
		builds = append(builds, own)
	}
	b, err := format.CanonicalJSON(builds)
	return string(b), err
}

// change makes of what was found at a path what goes into the image.
func (m *Minimal) change(a *attr, det *details) {
	if m.Owner != nil {
		a.uid, a.gid = m.Owner.UID, m.Owner.GID
	}
	if m.NoXattrs && det != nil {
		det.xattrs = nil
	}
}

// drops reports whether files of a kind are left out.
func (m *Minimal) drops(k format.Kind) bool {
	return m.NoDevices && (k == format.KindChr || k == format.KindBlk)
}

// minimalDir shows of a directory what goes into the image.
type minimalDir struct {
	directory
	m *Minimal
	// elements is the path from the root. The directories down to one share an array: no two
	// of one parent are open at a time.
	elements []string
	attrs    map[string]attr // of the names, where their kind decides whether they are left out
}

var _ directory = (*minimalDir)(nil)

// minimize returns the root of a tree without what is to be left out.
func (m *Minimal) minimize(root directory) directory {
	if m.isZero() {
		return root
	}
	return &minimalDir{directory: root, m: m}
}

func (d *minimalDir) self() (attr, details, error) {
	a, det, err := d.directory.self()
	d.m.change(&a, &det)
	return a, det, err
}

func (d *minimalDir) names() ([]string, error) {
	all, err := d.directory.names()
	if err != nil {
		return nil, err
	}
	kept := make([]string, 0, len(all))
	for _, name := range all {
		if excluded(d.m.Exclude, append(d.elements, name)) {
			continue
		}
		if d.m.NoDevices {
			a, err := d.directory.stat(name)
			if err != nil {
				return nil, err
			}
			if d.m.drops(a.kind) {
				continue
			}
			if d.attrs == nil {
				d.attrs = make(map[string]attr, len(all))
			}
			d.attrs[name] = a
		}
		kept = append(kept, name)
	}
	return kept, nil
}

func (d *minimalDir) stat(name string) (attr, error) {
	a, seen := d.attrs[name]
	if !seen {
		var err error
		if a, err = d.directory.stat(name); err != nil {
			return a, err
		}
	}
	d.m.change(&a, nil)
	return a, nil
}

func (d *minimalDir) details(name string, a *attr, file io.ReadCloser) (details, error) {
	det, err := d.directory.details(name, a, file)
	d.m.change(a, &det)
	return det, err
}

func (d *minimalDir) enter(name string, a *attr) (directory, error) {
	sub, err := d.directory.enter(name, a)
	if err != nil {
		return nil, err
	}
	return &minimalDir{directory: sub, m: d.m, elements: append(d.elements, name)}, nil
}
