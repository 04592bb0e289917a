package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/spelling"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// The volume attributes of a pod. Everything else is refused, except what kubelet adds
// under kubeletPrefix.
const (
	attrImage      = "image"
	attrDigest     = "digest"
	attrPullPolicy = "pullPolicy"
	attrSubPath    = "subPath"
	attrMode       = "mode"
	attrModTime    = "mtime"

	kubeletPrefix = "csi.storage.k8s.io/"
	attrEphemeral = kubeletPrefix + "ephemeral"
)

// attributeNames lists the valid attributes in the order messages name them.
func attributeNames() []string {
	return []string{attrImage, attrDigest, attrPullPolicy, attrSubPath, attrMode, attrModTime}
}

// secretKey is the key of a kubernetes.io/dockerconfigjson secret, the only kind that is read.
const secretKey = ".dockerconfigjson" //nolint:gosec // G101: the name of a key, no credential

// verityPrefix marks the fs-verity form of the attribute digest.
const verityPrefix = "verity:"

// pullPolicy says when the registry is asked.
type pullPolicy string

const (
	// pullAlways asks the registry at every publish; content that is here is not fetched again.
	pullAlways pullPolicy = "Always"
	// pullIfNotPresent asks only when the image is not whole on the node.
	pullIfNotPresent pullPolicy = "IfNotPresent"
	// pullNever fetches nothing.
	pullNever pullPolicy = "Never"
)

// volumeSpec is a validated publish request: what to mount where, and on whose behalf.
type volumeSpec struct {
	// args identify the request: a second one for the same target must have equal ones.
	args args
	// ref has a Digest when the pod pins the image by SHA-256.
	ref registry.Reference
	// verity is the zero value unless the pod pins the image by fs-verity digest.
	verity verity.Digest
	policy pullPolicy
	// options are those of the mount that the volume needs.
	options superOptions
	// creds are the pod's own credentials, nil without a secret.
	creds registry.CredentialFunc
	// identity tells credentials apart without keeping them: "" for the node's,
	// else a hash of the secret. It is never written to disk or logged.
	identity string
}

// args are the parts of a publish request that must not change while it is published.
type args struct {
	VolumeID   string            `json:"volumeId"`
	TargetPath string            `json:"targetPath"`
	Attributes map[string]string `json:"attributes"`
	AccessMode string            `json:"accessMode"`
	ReadOnly   bool              `json:"readOnly"`
	MountFlags []string          `json:"mountFlags,omitempty"`
}

// equal reports whether two requests ask for the same.
func (a args) equal(b args) bool {
	return a.VolumeID == b.VolumeID && a.TargetPath == b.TargetPath && a.AccessMode == b.AccessMode &&
		a.ReadOnly == b.ReadOnly && maps.Equal(a.Attributes, b.Attributes) && slices.Equal(a.MountFlags, b.MountFlags)
}

func (a args) subPath() string { return a.Attributes[attrSubPath] }

// options returns the options of the file system that a request asks for.
func (a args) options() (superOptions, error) {
	modTime, err := parseModTime(a.Attributes[attrModTime])
	if err != nil {
		return superOptions{}, err
	}
	_, selinux, err := parseRequestFlags(a.MountFlags)
	return superOptions{modTime: modTime, selinux: selinux}, err
}

// parsePublish validates a publish request. All its errors wrap ErrInvalid.
func parsePublish(req *csi.NodePublishVolumeRequest) (volumeSpec, error) {
	if req.GetVolumeId() == "" {
		return volumeSpec{}, fmt.Errorf("read request: no volume id: %w", ErrInvalid)
	}
	if err := checkTarget(req.GetTargetPath()); err != nil {
		return volumeSpec{}, err
	}
	flags, err := parseCapability(req.GetVolumeCapability())
	if err != nil {
		return volumeSpec{}, err
	}
	if req.GetVolumeContext()[attrEphemeral] == "true" && !req.GetReadonly() {
		return volumeSpec{}, fmt.Errorf("read request: PuzzleFS volumes are read-only; set readOnly: true on the pod's csi volume: %w", ErrInvalid)
	}
	spec, err := parseAttributes(req.GetVolumeContext())
	if err != nil {
		return volumeSpec{}, err
	}
	if spec.creds, spec.identity, err = parseSecrets(req.GetSecrets()); err != nil {
		return volumeSpec{}, err
	}
	spec.args.VolumeID = req.GetVolumeId()
	spec.args.TargetPath = req.GetTargetPath()
	spec.args.ReadOnly = req.GetReadonly()
	spec.args.AccessMode = req.GetVolumeCapability().GetAccessMode().GetMode().String()
	spec.args.MountFlags = flags
	spec.options, err = spec.args.options()
	return spec, err
}

// parseCapability accepts what a read-only directory can be, and returns the mount flags as
// parseRequestFlags does. Every access mode is accepted: whatever it says, the volume is mounted read-only.
func parseCapability(c *csi.VolumeCapability) ([]string, error) {
	if c == nil {
		return nil, fmt.Errorf("read request: no volume capability: %w", ErrInvalid)
	}
	if c.GetBlock() != nil {
		return nil, fmt.Errorf("read volume capability: a PuzzleFS image is a file system, not a block device; use volumeMode: Filesystem: %w", ErrInvalid)
	}
	m := c.GetMount()
	if m == nil {
		return nil, fmt.Errorf("read volume capability: no access type; want mount: %w", ErrInvalid)
	}
	if t := m.GetFsType(); t != "" && t != "puzzlefs" {
		return nil, fmt.Errorf("read volume capability: fsType %q; leave it out, or say puzzlefs: %w", t, ErrInvalid)
	}
	flags, _, err := parseRequestFlags(m.GetMountFlags())
	return flags, err
}

// parseAttributes validates the volume attributes of a pod.
func parseAttributes(vc map[string]string) (volumeSpec, error) {
	spec := volumeSpec{args: args{Attributes: map[string]string{}}}
	for _, k := range slices.Sorted(maps.Keys(vc)) {
		if strings.HasPrefix(k, kubeletPrefix) {
			continue
		}
		if !slices.Contains(attributeNames(), k) {
			return volumeSpec{}, unknownAttribute(k)
		}
		spec.args.Attributes[k] = vc[k]
	}
	if vc[attrImage] == "" {
		return volumeSpec{}, fmt.Errorf("read attributes: no image; set volumeAttributes.image, as in registry.example/app:1.0: %w", ErrInvalid)
	}
	var err error
	if spec.ref, err = registry.ParseReference(vc[attrImage]); err != nil {
		return volumeSpec{}, fmt.Errorf("read attribute image: %w: %w", err, ErrInvalid)
	}
	if err := spec.pin(vc[attrDigest]); err != nil {
		return volumeSpec{}, err
	}
	switch p := pullPolicy(vc[attrPullPolicy]); p {
	case "":
		spec.policy = pullAlways
		if spec.pinned() {
			spec.policy = pullIfNotPresent
		}
	case pullAlways, pullIfNotPresent, pullNever:
		spec.policy = p
	default:
		return volumeSpec{}, fmt.Errorf("read attribute pullPolicy %q: want Always, IfNotPresent or Never: %w", p, ErrInvalid)
	}
	if spec.policy == pullNever && !spec.pinned() {
		return volumeSpec{}, fmt.Errorf("read attribute pullPolicy: Never needs a digest, for only the registry knows what a tag means: %w", ErrInvalid)
	}
	switch m := vc[attrMode]; m {
	case "", "eager":
	case "lazy":
		return volumeSpec{}, fmt.Errorf("read attribute mode: lazy is not in this version, every image is fetched whole; leave mode out, or say eager: %w", ErrInvalid)
	default:
		return volumeSpec{}, fmt.Errorf("read attribute mode %q: want eager, or leave it out: %w", m, ErrInvalid)
	}
	if _, err := parseModTime(vc[attrModTime]); err != nil {
		return volumeSpec{}, err
	}
	return spec, checkSubPath(vc[attrSubPath])
}

// pinned says whether the pod names a digest.
func (s volumeSpec) pinned() bool { return !s.ref.Digest.IsZero() || s.verity != verity.Digest{} }

// pin reads the attribute digest into s.
func (s *volumeSpec) pin(text string) error {
	switch {
	case text == "":
		return nil
	case text == format.Digest{}.String(), text == verityPrefix+verity.Digest{}.String():
		return fmt.Errorf("read attribute digest: only zeros, as in the examples, name nothing; write the digest that csi-puzzlefs build and push print: %w", ErrInvalid)
	case strings.HasPrefix(text, format.DigestPrefix):
		d, err := format.ParseDigest(text)
		if err != nil {
			return fmt.Errorf("read attribute digest: want sha256: and 64 lower-case hex digits, got %q: %w", text, ErrInvalid)
		}
		if !s.ref.Digest.IsZero() && s.ref.Digest != d {
			return fmt.Errorf("read attributes: image names %v and digest %v; make them equal, or leave one out: %w", s.ref.Digest, d, ErrInvalid)
		}
		s.ref.Digest = d
		return nil
	case strings.HasPrefix(text, verityPrefix):
		v, err := verity.Parse(strings.TrimPrefix(text, verityPrefix))
		if err != nil {
			return fmt.Errorf("read attribute digest: want verity: and 64 lower-case hex digits, got %q: %w", text, ErrInvalid)
		}
		s.verity = v
		return nil
	default:
		return fmt.Errorf("read attribute digest %q: say which digest it is: sha256:<64 hex> (of the OCI image manifest) or verity:<64 hex> (the fs-verity digest that the PuzzleFS tools print): %w", text, ErrInvalid)
	}
}

// checkSubPath accepts "" and a clean relative path that stays inside the image.
func checkSubPath(p string) error {
	switch {
	case p == "":
		return nil
	case strings.ContainsRune(p, 0):
		return fmt.Errorf("read attribute subPath %q: it contains a NUL byte, which no name has: %w", p, ErrInvalid)
	case path.IsAbs(p):
		return fmt.Errorf("read attribute subPath %q: want a path relative to the image's root, without the leading slash: %w", p, ErrInvalid)
	case slices.Contains(strings.Split(p, "/"), ".."):
		return fmt.Errorf("read attribute subPath %q: .. is not allowed; name the directory from the image's root: %w", p, ErrInvalid)
	case path.Clean(p) != p || p == ".":
		return fmt.Errorf("read attribute subPath %q: write it as %q, or leave it out for the whole image: %w", p, path.Clean(p), ErrInvalid)
	}
	return nil
}

// parseSecrets reads the pod's pull secret. Its errors never contain any of the secret.
func parseSecrets(secrets map[string]string) (registry.CredentialFunc, string, error) {
	if len(secrets) == 0 {
		return nil, "", nil
	}
	text, ok := secrets[secretKey]
	if !ok || len(secrets) > 1 {
		return nil, "", fmt.Errorf("read nodePublishSecretRef: want a secret of type kubernetes.io/dockerconfigjson, with the key %s and no other: %w", secretKey, ErrInvalid)
	}
	creds, err := registry.ParseDockerConfigJSON([]byte(text))
	if err != nil {
		// The cause may quote the secret: it is dropped.
		return nil, "", fmt.Errorf("read nodePublishSecretRef: the value of %s is not a Docker config.json; make it with kubectl create secret docker-registry: %w", secretKey, ErrInvalid)
	}
	sum := sha256.Sum256([]byte(text))
	return creds, hex.EncodeToString(sum[:]), nil
}

// unknownAttribute names the valid keys and the one that was probably meant.
func unknownAttribute(key string) error {
	hint := ""
	if name := spelling.Nearest(key, attributeNames()); name != "" {
		hint = fmt.Sprintf("; did you mean %s?", name)
	}
	return fmt.Errorf("read attributes: %q is not known%s (valid are %s): %w", key, hint, strings.Join(attributeNames(), ", "), ErrInvalid)
}
