package builder

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

const (
	// archiveBuffer is how much of an archive is read at once, in bytes.
	archiveBuffer = 256 << 10
	// maxWindow bounds the memory for a zstd window, in bytes: what zstd itself takes unasked.
	maxWindow = 128 << 20
	tarBlock  = 512
)

// Prefixes and names of PAX records. Keys of the first kind are as tar programs know them,
// values are bytes; of the second, keys are percent-encoded and values base64.
const (
	recordXattr           = "SCHILY.xattr."
	recordLibarchiveXattr = "LIBARCHIVE.xattr."
	recordACL             = "SCHILY.acl."
)

// quote returns a name from an archive fit for a message: one line, printable, of bounded length.
func quote(s string) string {
	const most = 200
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}

// archive reads tar streams into a tree.
type archive struct {
	ctx  context.Context
	t    *memTree
	warn func(string)
	// warned says that the user knows of ACLs that are not kept.
	warned bool
}

// read reads a tar stream, perhaps compressed, to its end, and puts it into the layer. sum,
// if not nil, gets the uncompressed bytes. trailer says that the archive must have the block
// of zeros that tells its end from a cut.
func (a *archive) read(r io.Reader, l *layer, sum hash.Hash, trailer bool) (err error) {
	from := &endReader{r: r}
	raw := bufio.NewReaderSize(from, archiveBuffer)
	plain, closePlain, err := decompress(raw)
	if err != nil {
		return explain(from, nil, err)
	}
	defer closePlain()
	if sum != nil {
		plain = io.TeeReader(plain, sum)
	}
	end := &endReader{r: bufio.NewReaderSize(plain, archiveBuffer)}
	if err := a.entries(l, end); err != nil {
		return explain(from, end, err)
	}
	if trailer && end.zeros < tarBlock {
		return fmt.Errorf("it ends without the mark that a tar archive ends with, as one does that was cut off: %w", ErrArchive)
	}
	// What follows has no meaning, but belongs to the checksums, of gzip as of the layer.
	for _, rest := range []io.Reader{end, raw} {
		if _, err := io.Copy(io.Discard, contextReader{a.ctx, rest}); err != nil {
			return explain(from, end, err)
		}
	}
	return nil
}

// entries reads the tar stream to the mark that ends it, or to its end.
func (a *archive) entries(l *layer, end *endReader) error {
	tr := tar.NewReader(end)
	for {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		end.zeros = 0
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := a.entry(l, h, tr); err != nil {
			return fmt.Errorf("entry %s: %w", quote(h.Name), err)
		}
	}
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// decompress returns the uncompressed form of an archive.
func decompress(r *bufio.Reader) (io.Reader, func(), error) {
	head, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	starts := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	switch {
	case starts("\x1f\x8b"):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, fmt.Errorf("read gzip: %w", noEOF(err))
		}
		return z, func() { _ = z.Close() }, nil // reading to the end checks the sum
	case starts("\x28\xb5\x2f\xfd"), len(head) >= 4 && head[0]&0xf0 == 0x50 && starts(string(head[0])+"\x2a\x4d\x18"):
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, fmt.Errorf("read zstd: %w", err)
		}
		return z, z.Close, nil
	case starts("\xfd7zXZ\x00"):
		return nil, nil, fmt.Errorf("it is compressed with xz: decompress it first, as in xz -dc FILE | csi-puzzlefs build tar:- …: %w", ErrArchive)
	case starts("BZh"):
		return nil, nil, fmt.Errorf("it is compressed with bzip2: decompress it first, as in bzip2 -dc FILE | csi-puzzlefs build tar:- …: %w", ErrArchive)
	case len(head) == 0:
		return nil, nil, fmt.Errorf("it is empty: %w", ErrArchive)
	}
	return r, func() {}, nil
}

// endReader counts the zeros at the end of what was read, and keeps the error that reading
// ended with, to tell a source that fails from an archive that is damaged.
type endReader struct {
	r     io.Reader
	zeros int
	err   error
}

func (e *endReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	tail := len(bytes.TrimRight(p[:n], "\x00"))
	if tail > 0 {
		e.zeros = 0
	}
	e.zeros += n - tail
	if err != nil {
		e.err = err
	}
	return n, err
}

// explain says what an error of reading an archive means: from is what it comes from, end, if
// not nil, what it is after decompression.
func explain(from, end *endReader, err error) error {
	switch {
	case from.err != nil && !errors.Is(from.err, io.EOF):
		return from.err
	case errors.Is(err, ErrArchive), errors.Is(err, format.ErrTooLarge):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: the archive is cut off: %w", err, ErrArchive)
	case errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("%w: this is no tar archive, or a damaged one: %w", err, ErrArchive)
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return fmt.Errorf("%w: it is compressed with a window of more than %d bytes: decompress it first, "+
			"as in zstd -dc --long=31 FILE | csi-puzzlefs build tar:- …: %w", err, maxWindow, format.ErrTooLarge)
	case errors.Is(err, tar.ErrFieldTooLong):
		return fmt.Errorf("%w: %w", err, format.ErrTooLarge)
	case end == nil, end.err != nil && !errors.Is(end.err, io.EOF):
		return fmt.Errorf("%w: the compressed archive is damaged: %w", err, ErrArchive)
	}
	return err
}

// entry puts one entry into the layer.
func (a *archive) entry(l *layer, h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return checkGlobal(h)
	}
	parts, err := splitName(h.Name)
	if err != nil {
		return err
	}
	if done, err := l.whiteout(parts); done || err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		return l.hardLink(h.Name, parts, h.Linkname)
	}
	at, err := attrOf(h)
	if err != nil {
		return err
	}
	det, err := a.detailsOf(h)
	if err != nil {
		return err
	}
	n, err := l.t.newNode(at, det)
	if err != nil {
		return err
	}
	if n.size > 0 {
		if n.off, err = l.t.spool.add(content, n.size); err != nil {
			return err
		}
	}
	return l.add(parts, n)
}

// checkGlobal refuses PAX records for all entries that follow, unless they change nothing
// that an image has.
func checkGlobal(h *tar.Header) error {
	for k := range h.PAXRecords {
		switch k {
		case "comment", "mtime", "atime", "ctime", "charset", "hdrcharset", "gname", "uname":
		default:
			return fmt.Errorf("the archive has the global PAX record %s, which is not supported: %w", quote(k), ErrArchive)
		}
	}
	return nil
}

// attrOf returns what a header says of a file.
func attrOf(h *tar.Header) (attr, error) {
	a := attr{perm: uint16(h.Mode & 0o7777)}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		a.kind, a.size = format.KindFile, h.Size
	case tar.TypeDir:
		a.kind = format.KindDir
	case tar.TypeSymlink:
		// Linux has no modes for symlinks; what archives say differs.
		a.kind, a.perm = format.KindSymlink, 0o777
	case tar.TypeChar:
		a.kind = format.KindChr
	case tar.TypeBlock:
		a.kind = format.KindBlk
	case tar.TypeFifo:
		a.kind = format.KindFifo
	default:
		return attr{}, fmt.Errorf("it is of the unsupported type %q: %w", h.Typeflag, ErrArchive)
	}
	for _, v := range []struct {
		to   *uint32
		from int64
		what string
	}{
		{&a.uid, int64(h.Uid), "owner"},
		{&a.gid, int64(h.Gid), "group"},
		{&a.major, h.Devmajor, "device number"},
		{&a.minor, h.Devminor, "device number"},
	} {
		if v.from < 0 || v.from > math.MaxUint32 {
			return attr{}, fmt.Errorf("its %s is %d: %w", v.what, v.from, ErrArchive)
		}
		*v.to = uint32(v.from)
	}
	if a.kind != format.KindChr && a.kind != format.KindBlk {
		a.major, a.minor = 0, 0
	}
	if a.size < 0 {
		return attr{}, fmt.Errorf("its size is %d: %w", a.size, ErrArchive)
	}
	return a, nil
}

// detailsOf returns the symlink's target and the extended attributes.
func (a *archive) detailsOf(h *tar.Header) (details, error) {
	var det details
	if h.Typeflag == tar.TypeSymlink {
		if n := len(h.Linkname); n == 0 || n > format.MaxSymlinkLen || strings.IndexByte(h.Linkname, 0) >= 0 {
			return details{}, fmt.Errorf("it is a symlink with a target of %d bytes, want 1 to %d without NUL: %w", n, format.MaxSymlinkLen, ErrArchive)
		}
		det.target = []byte(h.Linkname)
	}
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, recordACL) && !a.warned && a.warn != nil {
			a.warned = true
			a.warn("the archive has access control lists as text (" + quote(h.Name) +
				" is the first), which are left out: pack it with tar --xattrs --xattrs-include='*' instead of --acls")
		}
		key, val, ok, err := xattrOf(k, v, h.PAXRecords)
		if err != nil {
			return details{}, err
		}
		if !ok {
			continue
		}
		if len(key) == 0 || len(key) > format.MaxXattrKey || strings.IndexByte(key, 0) >= 0 || len(val) > format.MaxXattrValue {
			return details{}, fmt.Errorf("its extended attribute %s of %d bytes is not possible: %w", quote(key), len(val), ErrArchive)
		}
		det.xattrs = append(det.xattrs, format.Xattr{Key: []byte(key), Val: val})
	}
	slices.SortFunc(det.xattrs, func(x, y format.Xattr) int { return bytes.Compare(x.Key, y.Key) })
	for i := 1; i < len(det.xattrs); i++ {
		if key := det.xattrs[i].Key; bytes.Equal(key, det.xattrs[i-1].Key) {
			// Records have no order, so none of them is the last.
			return details{}, fmt.Errorf("its extended attribute %s is there twice, under names that are written differently: %w", quote(string(key)), ErrArchive)
		}
	}
	return det, nil
}

// xattrEscapes undoes what GNU tar does to names of extended attributes, since = ends the
// key of a record.
var xattrEscapes = strings.NewReplacer("%3D", "=", "%25", "%")

// xattrOf returns the extended attribute that a PAX record holds, if it holds one.
//
// bsdtar writes two records for each, with one name, which is percent-encoded in both, though
// in the first of them no other program does that. Where nothing is encoded they say the same.
func xattrOf(k, v string, all map[string]string) (key string, val []byte, ok bool, err error) {
	if key, ok = strings.CutPrefix(k, recordXattr); ok {
		_, twice := all[recordLibarchiveXattr+key]
		if twice && strings.Contains(key, "%") {
			return "", nil, false, nil
		}
		return xattrEscapes.Replace(key), []byte(v), true, nil
	}
	text, ok := strings.CutPrefix(k, recordLibarchiveXattr)
	if !ok {
		return "", nil, false, nil
	}
	if key, err = url.PathUnescape(text); err != nil {
		return "", nil, false, fmt.Errorf("its PAX record %s: %w: %w", quote(k), ErrArchive, err)
	}
	if _, twice := all[recordXattr+text]; twice && !strings.Contains(text, "%") {
		return "", nil, false, nil
	}
	if val, err = base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "=")); err != nil {
		return "", nil, false, fmt.Errorf("its PAX record %s: %w: %w", quote(k), ErrArchive, err)
	}
	return key, val, true, nil
}
