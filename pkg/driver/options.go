package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// superOptions are the options of a volume that belong to the file system as a whole, so that
// volumes which differ in them cannot share a mount. They are comparable.
type superOptions struct {
	// modTime is in UTC; the zero Time means 1970.
	modTime time.Time
	// selinux has the form of the kernel's options: context="LABEL",…, sorted.
	selinux string
}

// list returns the SELinux options one by one, without quotes.
func (o superOptions) list() []string {
	var list []string
	for rest := o.selinux; rest != ""; {
		var one string
		// A label has no quote in it, but may have commas.
		one, rest, _ = strings.Cut(rest, `",`)
		list = append(list, strings.ReplaceAll(one, `"`, ""))
	}
	return list
}

// mountKey tells which volumes share a mount: those of one image with the same options.
type mountKey struct {
	manifest format.Digest
	options  superOptions
}

// name is that of the mount's directory: the digest, as it always was, and where there are
// options a hash of them behind it.
func (k mountKey) name() string {
	if k.options == (superOptions{}) {
		return k.manifest.Hex()
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "mtime=%d.%09d\n%s", k.options.modTime.Unix(), k.options.modTime.Nanosecond(), k.options.selinux))
	return k.manifest.Hex() + "-" + hex.EncodeToString(sum[:8])
}

// lastSecond is the last that RFC 3339 can write.
const lastSecond = 253402300799

// parseModTime reads the attribute mtime: RFC 3339, or seconds since 1970. 1970 itself is the
// zero Time, since that is what a volume without the attribute shows.
func parseModTime(text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		seconds, numErr := strconv.ParseInt(text, 10, 64)
		if numErr != nil {
			return time.Time{}, fmt.Errorf("read attribute mtime %q: want RFC 3339, as in 2026-01-31T12:00:00Z, or seconds since 1970: %w", text, ErrInvalid)
		}
		t = time.Unix(seconds, 0)
	}
	if s := t.Unix(); s < 0 || s > lastSecond {
		return time.Time{}, fmt.Errorf("read attribute mtime %q: want a time from 1970-01-01T00:00:00Z to 9999-12-31T23:59:59Z: %w", text, ErrInvalid)
	}
	if t.Equal(time.Unix(0, 0)) {
		return time.Time{}, nil
	}
	return t.UTC(), nil
}

// mountFlags say what works in a mount that does not by default. Each mount has its own, be
// it of the image or a bind of that.
type mountFlags struct {
	dev, suid, noexec bool
}

// parseMountFlags reads Config.MountOptions.
func parseMountFlags(options []string) (mountFlags, error) {
	var f mountFlags
	opposite := map[string]string{"nodev": "dev", "dev": "nodev", "nosuid": "suid", "suid": "nosuid", "noexec": "exec", "exec": "noexec"}
	for _, o := range options {
		other, ok := opposite[o]
		if !ok {
			return f, fmt.Errorf("mount option %q: want some of nodev, nosuid, noexec, dev, suid and exec", o)
		}
		if slices.Contains(options, other) {
			return f, fmt.Errorf("mount options %s and %s contradict each other; leave one out", o, other)
		}
		switch o {
		case "dev":
			f.dev = true
		case "suid":
			f.suid = true
		case "noexec":
			f.noexec = true
		}
	}
	return f, nil
}

// tighten returns the flags of a bind: what the request says can only take away.
func (f mountFlags) tighten(requested []string) mountFlags {
	return mountFlags{
		dev:    f.dev && !slices.Contains(requested, "nodev"),
		suid:   f.suid && !slices.Contains(requested, "nosuid"),
		noexec: f.noexec || slices.Contains(requested, "noexec"),
	}
}

// maxLabel bounds an SELinux label in bytes.
const maxLabel = 1024

// parseRequestFlags reads the mount flags of a request, which are those of a persistent volume
// and, with seLinuxMount, kubelet's context="LABEL". It returns them sorted and without
// repetition, and the options of the file system among them.
func parseRequestFlags(requested []string) (flags []string, selinux string, err error) {
	var contexts []string
	for _, f := range requested {
		name, label, hasLabel := strings.Cut(f, "=")
		switch name {
		case "ro", "nodev", "nosuid", "noexec", "noatime", "nodiratime", "relatime":
			if hasLabel {
				return nil, "", fmt.Errorf("read volume capability: mount option %q takes no value: %w", f, ErrInvalid)
			}
		case "context", "fscontext", "defcontext", "rootcontext":
			if f, err = parseContext(name, label); err != nil {
				return nil, "", err
			}
			contexts = append(contexts, f)
		case "rw":
			return nil, "", fmt.Errorf("read volume capability: mount option rw: PuzzleFS volumes are read-only; leave it out of mountOptions: %w", ErrInvalid)
		case "dev", "suid", "exec":
			return nil, "", fmt.Errorf("read volume capability: mount option %s: a volume can only be stricter than the node's --mount-options; leave it out of mountOptions: %w", name, ErrInvalid)
		default:
			return nil, "", fmt.Errorf("read volume capability: mount option %q: known are ro, nodev, nosuid, noexec, noatime, nodiratime, relatime and SELinux's context, fscontext, defcontext and rootcontext: %w", f, ErrInvalid)
		}
		flags = append(flags, f)
	}
	slices.Sort(flags)
	slices.Sort(contexts)
	contexts = slices.Compact(contexts)
	for i := 1; i < len(contexts); i++ {
		if name, _, _ := strings.Cut(contexts[i], "="); strings.HasPrefix(contexts[i-1], name+"=") {
			return nil, "", fmt.Errorf("read volume capability: mount options %s and %s: want one %s: %w", contexts[i-1], contexts[i], name, ErrInvalid)
		}
	}
	return slices.Compact(flags), strings.Join(contexts, ","), nil
}

// parseContext reads the label of an SELinux option, with quotes or without, and returns the
// option with them. Nothing in a label may end it, lest another option follow.
func parseContext(name, label string) (string, error) {
	if inner, ok := strings.CutPrefix(label, `"`); ok {
		label = strings.TrimSuffix(inner, `"`)
	}
	bad := func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '"' || r == '\\' }
	if label == "" || len(label) > maxLabel || strings.ContainsFunc(label, bad) {
		return "", fmt.Errorf("read volume capability: mount option %s=%q: want a label as in %s=\"system_u:object_r:container_file_t:s0\": %w", name, label, name, ErrInvalid)
	}
	return name + `="` + label + `"`, nil
}
