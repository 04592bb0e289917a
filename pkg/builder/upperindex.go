package builder

import (
	"encoding/binary"
	"strconv"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// An overlay that is mounted with index=on keeps hard links together: when a file with several
// names below is changed by one name, all of them show the change, though the upper directory
// has only those that were used. Which file below it was is in the attribute origin, as the file handle
// that the file system below gave out; ours has the inode number in it.

// resolveIndexed finds the inodes of the base whose other names change with files of the
// upper directory. It refuses what it cannot be sure of.
func (p *upperPlan) resolveIndexed(root *upperNode) error {
	linked := make(map[uint64]int) // names in the base
	if len(p.order) > 0 || len(root.marks.origin) > 0 {
		if err := p.countLinks(format.RootIno, linked); err != nil {
			return err
		}
	}
	for _, id := range p.order {
		if err := p.resolveGroup(p.indexed[id], linked); err != nil {
			return err
		}
	}
	// The attribute is on the root only where there is an index. A file whose name is gone is
	// there and nowhere else, if it has other names.
	if len(root.marks.origin) == 0 {
		return nil
	}
	return p.checkGone(root, linked)
}

// countLinks counts the names that lead to the files below a directory of the base.
func (p *upperPlan) countLinks(dir uint64, linked map[uint64]int) error {
	for queue := []uint64{dir}; len(queue) > 0; {
		dir := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if err := p.ctx.Err(); err != nil {
			return err
		}
		for _, e := range p.base.entries(dir) {
			i := p.base.find(e.Ino)
			if i == nil {
				continue
			}
			linked[e.Ino]++
			if i.Kind == format.KindDir && linked[e.Ino] == 1 {
				queue = append(queue, e.Ino)
			}
		}
	}
	return nil
}

// resolveGroup does so for the names of one file.
func (p *upperPlan) resolveGroup(group []*upperNode, linked map[uint64]int) error {
	c := group[0]
	ofUpper, diff, err := c.union()
	if err != nil {
		return err
	}
	// The names of the file in the overlay: those in the base that are left are as many more.
	matches := func(ino uint64) bool {
		i := p.base.find(ino)
		names := diff
		if ofUpper {
			names += int64(c.links)
		} else {
			names += int64(linked[ino])
		}
		return i != nil && i.Kind == c.kind && p.taken[ino] == nil && names == int64(len(group)+p.unchanged[ino].names)
	}
	if ofUpper && int64(c.links)+diff == int64(len(group)) {
		return nil // all its names are here
	}
	var found uint64
	if ino, ok := fuseOrigin(c.marks.origin); ok {
		if matches(ino) {
			found = ino
		}
	} else {
		// Another file system's handle says nothing. There may be only one that it can be.
		for ino, names := range linked {
			if left := p.unchanged[ino].names; left == 0 || names == left || !matches(ino) {
				continue
			}
			if found != 0 {
				found = 0
				break
			}
			found = ino
		}
	}
	if found == 0 {
		return c.wrong("it is a hard link of an overlay with index=on, and it cannot be told which other names in the base image it changes: mount the image with index=off, or build from the directory where the overlay is mounted")
	}
	c.at.base = found
	p.taken[found] = c
	return nil
}

// union returns how many names the file has in the overlay, as the difference to the link
// count of the file in the upper directory or in the base.
func (n *upperNode) union() (ofUpper bool, diff int64, err error) {
	text := n.marks.nlink
	if len(text) > 1 && (text[0] == 'U' || text[0] == 'L') {
		if diff, err := strconv.ParseInt(text[1:], 10, 32); err == nil {
			return text[0] == 'U', diff, nil
		}
	}
	return false, 0, n.wrong("its attribute nlink is %q, which this program does not know", text)
}

// checkGone refuses names that are gone from a directory, or what is below it, while other
// names of their files are left whose content only the index has.
func (p *upperPlan) checkGone(dir *upperNode, linked map[uint64]int) error {
	for _, c := range dir.children {
		if c.excluded {
			continue
		}
		if at := c.at.path; at != 0 && linked[at] > 1 && p.unchanged[at].names > 0 && p.taken[at] == nil {
			return c.wrong("it was one of several names of a file in the base image, in an overlay with index=on, which may keep the content of the others outside of the upper directory: mount the image with index=off, or build from the directory where the overlay is mounted")
		}
		if c.present() && c.kind == format.KindDir {
			if err := p.checkGone(c, linked); err != nil {
				return err
			}
		}
	}
	return nil
}

// fuseOrigin returns the inode number in an origin that a FUSE mount of an image has given:
//
//	byte 0 version 0 · 1 magic 0xfb · 2 length · 3 flags · 4 type · 5 UUID, 16 bytes, zero ·
//	21 the number's upper and lower half and the generation, 4 bytes each
//
// in the order of bytes of the machine. Ours gives no generation and no numbers over 32 bits, and so is not
// taken for XFS, which has handles of the same type with the halves the other way round.
func fuseOrigin(b []byte) (uint64, bool) {
	const (
		magic         = 0xfb
		fileIDIno64   = 0x81
		size          = 33
		flagBigEndian = 1
	)
	if len(b) != size || b[0] != 0 || b[1] != magic || int(b[2]) != size || b[4] != fileIDIno64 || [16]byte(b[5:21]) != [16]byte{} {
		return 0, false
	}
	var order binary.ByteOrder = binary.LittleEndian
	if b[3]&flagBigEndian != 0 {
		order = binary.BigEndian
	}
	high, low, generation := order.Uint32(b[21:]), order.Uint32(b[25:]), order.Uint32(b[29:])
	return uint64(low), high == 0 && generation == 0 && low != 0
}
