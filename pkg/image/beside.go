package image

import "github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"

// besideNodes bounds how many inodes behind a file are looked at for what is beside it.
const besideNodes = 1024

// Beside calls fn for the files whose whole content was loaded and verified with the end of a file, and which
// come behind it in the order of the image, which is that of directories and the files in them. It stops
// where fn returns false. What fn returned true for it is not called for again, as long as that content is
// in the cache. fn must neither change the content nor keep it.
//
// It loads nothing. Who reads one small file after the other saves a request for each that is shown to them
// before they ask.
func (im *Image) Beside(ino uint64, fn func(ino uint64, content []byte) bool) {
	n, ok := im.index.find(ino)
	if !ok {
		return
	}
	d := &im.index.nodes[n]
	if d.kind != format.KindFile || d.count == 0 {
		return
	}
	blob := im.index.chunks[d.first+d.count-1].blob
	if im.index.blobs[blob].extent > unitSize {
		return
	}
	key := im.cacheKey(unitKey{blob: blob})
	content, shown, ok := im.cache.show(key, im.number, 0)
	if !ok || n < shown {
		return
	}
	end := min(int(n)+1+besideNodes, len(im.index.nodes))
	for next := n + 1; int(next) < end; next++ {
		d := &im.index.nodes[next]
		if d.kind != format.KindFile || d.count == 0 {
			continue
		}
		c := &im.index.chunks[d.first]
		if d.count > 1 || c.blob != blob || !fn(im.index.ino(next), content[c.off:c.off+c.end]) {
			break
		}
		shown = next
	}
	im.cache.show(key, im.number, shown)
}
