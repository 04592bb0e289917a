package driver

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/signature"
)

// Policy says which images may be mounted on the node. It is looked at whenever an image is to
// be had: at each new publish, and when lost content of a published volume is fetched again. A
// volume that is published stays as it is, whatever the policy of a later driver says. What is
// refused fails with ErrDenied.
type Policy struct {
	// RequireDigest refuses volumes that are named by a tag only. It should be set.
	RequireDigest bool
	// AllowedRegistries are prefixes, HOST[:PORT][/PATH], one of which the name of an image must
	// begin with, by whole components: "registry.example/team" allows registry.example/team/app
	// and not registry.example/teams. None allows all. Short names have their registry added
	// before, so that "app" is docker.io/library/app. Others are refused before anybody is asked.
	AllowedRegistries []string
	// SignatureKeys are keys, one of which must have signed each image; nil demands nothing.
	SignatureKeys *signature.Keys
	// MaxImageBytes bounds what the blobs of an image take on disk together, and the sum of the
	// sizes of its files; 0 does not.
	MaxImageBytes int64
	// MaxInodes bounds the inodes of all layers of an image together; 0 does not.
	MaxInodes uint64
}

// validate checks what an administrator wrote.
func (p *Policy) validate() error {
	for _, prefix := range p.AllowedRegistries {
		if err := checkPrefix(prefix); err != nil {
			return err
		}
	}
	if p.MaxImageBytes < 0 {
		return fmt.Errorf("maximum image size %d: want 0 for no limit, or a number of bytes", p.MaxImageBytes)
	}
	return nil
}

// checkPrefix accepts HOST[:PORT][/PATH] in the form that references have in full.
func checkPrefix(prefix string) error {
	const below = "/any/image"
	ref, err := registry.ParseReference(prefix + below)
	if err != nil || ref.Registry+"/"+ref.Repository != prefix+below {
		return fmt.Errorf("allowed registry %q: want HOST[:PORT][/PATH] without scheme, tag and trailing slash, as in registry.example.com/team or docker.io/library", prefix)
	}
	return nil
}

// checkPinned refuses a volume without the digest that is demanded.
func (p *Policy) checkPinned(spec volumeSpec) error {
	if !p.RequireDigest || spec.pinned() {
		return nil
	}
	return fmt.Errorf("read attributes: no digest; a tag can change under a running pod, so this node wants volumeAttributes.digest: sha256:<64 hex> or verity:<64 hex>: %w", errNoDigest)
}

// allows refuses an image of a registry that is not on the list.
func (p *Policy) allows(ref registry.Reference) error {
	name := ref.Registry + "/" + ref.Repository
	under := func(prefix string) bool { return name == prefix || strings.HasPrefix(name, prefix+"/") }
	if len(p.AllowedRegistries) == 0 || slices.ContainsFunc(p.AllowedRegistries, under) {
		return nil
	}
	const most = 10
	list := strings.Join(p.AllowedRegistries[:min(most, len(p.AllowedRegistries))], ", ")
	if len(p.AllowedRegistries) > most {
		list += ", …"
	}
	return fmt.Errorf("check image %s: this node allows images from %s only (the driver's --allowed-registries); use an image from there, or ask the administrator: %w", name, list, ErrDenied)
}

// tooLarge is the error for an image that has more than the policy allows.
func tooLarge(text string, args ...any) error {
	return fmt.Errorf("%s; make it smaller, or ask the administrator: %w: %w", fmt.Sprintf(text, args...), format.ErrTooLarge, ErrDenied)
}

// checkManifest refuses an image whose manifest admits that it is too large, before any of it
// is fetched.
func (p *Policy) checkManifest(name string, manifest []byte) error {
	if p.MaxImageBytes == 0 {
		return nil
	}
	m, err := format.ParseManifest(manifest)
	if err != nil {
		return err
	}
	sum := int64(len(manifest))
	for _, blob := range m.Blobs() {
		if blob.Size > math.MaxInt64-sum {
			sum = math.MaxInt64
			break
		}
		sum += blob.Size
	}
	return p.checkStored(name, sum)
}

// checkStored refuses an image whose blobs take that many bytes.
func (p *Policy) checkStored(name string, n int64) error {
	if p.MaxImageBytes == 0 || n <= p.MaxImageBytes {
		return nil
	}
	return tooLarge("check image %s: its blobs have %s together, this node takes %s (the driver's --max-image-size)", name, humanBytes(n), humanBytes(p.MaxImageBytes))
}

// checkStats refuses an image whose tree is too large. A few stored bytes can stand for many.
func (p *Policy) checkStats(name string, s image.Stats) error {
	if p.MaxImageBytes > 0 && s.Bytes > uint64(p.MaxImageBytes) {
		return tooLarge("check image %s: its files have %s together, this node takes %s (the driver's --max-image-size)", name, humanBytes(int64(s.Bytes)), humanBytes(p.MaxImageBytes))
	}
	if p.MaxInodes > 0 && s.LayerInodes > p.MaxInodes {
		return tooLarge("check image %s: it has %d inodes, this node takes %d (the driver's --max-inodes)", name, s.LayerInodes, p.MaxInodes)
	}
	return nil
}

// capped is a place for blobs that takes no more than the policy allows of one image. The
// sizes in a manifest are only what somebody says, and of small blobs what they have is taken;
// where a large one has more than its manifest says, the registry's client gives up.
type capped struct {
	registry.Destination
	policy *Policy
	name   string // of the image
	taken  atomic.Int64
}

// cap returns dst, with a limit if there is one.
func (p *Policy) cap(name string, dst registry.Destination) registry.Destination {
	if p.MaxImageBytes == 0 {
		return dst
	}
	return &capped{Destination: dst, policy: p, name: name}
}

// Put is that of the destination.
func (c *capped) Put(b []byte, d format.Digest) error {
	if err := c.policy.checkStored(c.name, c.taken.Add(int64(len(b)))); err != nil {
		return err
	}
	err := c.Destination.Put(b, d)
	if err != nil {
		c.taken.Add(-int64(len(b)))
	}
	return err
}
