package format

// Scan decodes a rootfs message inode by inode, without making lists of them: who mounts an image needs
// each inode once, and the decoded form is several times as large as the message. It is for messages of
// version 3 with a single layer, in the form that writers write. Like quick it never fails: of other
// messages it says that it is not for them, and DecodeRootfs has to say what they mean.
//
// What it yields has been validated as DecodeRootfs does. It is for one goroutine.
type Scan struct {
	q      quick
	inodes structures
	verity structures
	next   int
	last   uint64
	inode  Inode
	// entries and chunks are room for the lists of an inode, which is used again.
	entries []DirEntry
	chunks  []FileChunk
}

// Scan begins to decode a message. ok is false for one that Scan is not for; the limits are then as they
// were. What they count is what DecodeRootfs would count.
func (l *Limits) Scan(b []byte) (s *Scan, ok bool) {
	if len(b) > MaxRootfsSize || checkFraming(b) != nil {
		return nil, false
	}
	before := *l
	s = &Scan{
		q:       quick{d: &decoder{version: Version3, budget: len(b) / 8, limits: l}},
		entries: make([]DirEntry, listBlock),
		chunks:  make([]FileChunk, listBlock),
	}
	if !s.begin(b) {
		*l = before
		return nil, false
	}
	return s, true
}

func (s *Scan) begin(b []byte) bool {
	layers, verity, ok := s.q.root(b)
	if !ok || layers.n != 1 {
		return false
	}
	s.verity = verity
	s.inodes, ok = s.q.inodes(layers.at(0))
	return ok
}

// Len returns the number of inodes.
func (s *Scan) Len() int { return s.inodes.n }

// Blobs returns how many blobs the message has fs-verity digests of, which is how many blobs files refer
// to unless the message lies.
func (s *Scan) Blobs() int { return s.verity.n }

// Ino returns the number of an inode, 0 <= i < Len(), which may be one that has not been validated yet.
func (s *Scan) Ino(i int) uint64 { return s.inodes.at(i).uint64(0) }

// Next decodes the next inode. Numbers grow strictly. The inode and its lists are the caller's until the
// next call; the names, targets and attributes in it alias the message. It returns nil behind the last
// inode, or where the message turns out not to be for Scan, which End tells apart.
func (s *Scan) Next() *Inode {
	if s.next >= s.inodes.n {
		return nil
	}
	inode := &s.inode
	*inode = Inode{}
	s.q.d.spareEntries, s.q.d.spareChunks = s.entries, s.chunks
	if !s.q.inode(s.inodes.at(s.next), inode) || inode.validate() != nil || inode.Ino <= s.last {
		return nil
	}
	s.entries, s.chunks = larger(s.entries, inode.Entries), larger(s.chunks, inode.Chunks)
	s.last = inode.Ino
	s.next++
	return inode
}

// End reports whether all inodes were decoded, and the rest of the message is as it should be, which is the
// list of fs-verity digests. Where it is not, what Next returned means nothing.
func (s *Scan) End() (verity []VerityData, ok bool) {
	if s.next != s.inodes.n {
		return nil, false
	}
	return s.q.verities(s.verity)
}

func larger[T any](a, b []T) []T {
	if len(b) > len(a) {
		return b
	}
	return a
}
