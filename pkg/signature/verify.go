package signature

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Errors of this package. Those of a Fetcher pass through.
var (
	// ErrNotSigned says that there is no valid signature by any of the keys.
	ErrNotSigned = errors.New("not signed by a trusted key")
	// ErrNotFound is what a Fetcher's error wraps if the registry has no such thing.
	ErrNotFound = errors.New("no such signature")
)

const (
	mediaTypePayload    = "application/vnd.dev.cosign.simplesigning.v1+json"
	annotationSignature = "dev.cosignproject.cosign/signature"
	payloadType         = "cosign container image signature"
)

// Limits on what whoever may push to a repository can make us do.
const (
	// maxManifest bounds the manifest with the signatures, in bytes.
	maxManifest = 1 << 20
	// maxSignatures is how many signatures of an image are looked at.
	maxSignatures = 100
	// maxPayload bounds what was signed, in bytes: names and annotations.
	maxPayload = 64 << 10
	// maxSignature bounds a signature in base64, in bytes. One by an RSA key of 8192 bits
	// has 1368.
	maxSignature = 4 << 10
)

// Fetcher reads from the repository of an image.
type Fetcher interface {
	// Manifest returns the manifest that has a tag. Its error wraps ErrNotFound if there is
	// no such tag, and format.ErrTooLarge if it has more than limit bytes.
	Manifest(ctx context.Context, tag string, limit int64) ([]byte, error)
	// Blob returns the blob of that digest and size. Its error wraps ErrNotFound if it is
	// not there.
	Blob(ctx context.Context, d format.Digest, size int64) ([]byte, error)
}

// Tag returns the tag of the manifest with the signatures of an image.
func Tag(image format.Digest) string {
	return strings.Replace(image.String(), ":", "-", 1) + ".sig"
}

// Verify returns the fingerprint, see IDs, of a key that signed the image with that manifest
// digest. It fails with ErrNotSigned, naming what is wrong with the signatures that are there,
// or else with the Fetcher's error, if without that there could have been one.
func (k *Keys) Verify(ctx context.Context, f Fetcher, image format.Digest) (id string, err error) {
	layers, err := k.layers(ctx, f, image)
	if err != nil {
		return "", err
	}
	var failed error
	var reasons []string
	for i := range layers {
		id, err := k.verifyLayer(ctx, f, image, &layers[i])
		switch {
		case err == nil:
			return id, nil
		case errors.Is(err, ErrNotSigned):
			reasons = append(reasons, strings.TrimSuffix(err.Error(), ": "+ErrNotSigned.Error()))
		default:
			failed = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	if failed != nil {
		return "", fmt.Errorf("read the signatures of %v: %w", image, failed)
	}
	return "", fmt.Errorf("%s: %w", summary(reasons), ErrNotSigned)
}

// layer is a signature in the manifest.
type layer struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations"`
}

// layers returns the layers that claim to be signatures.
func (k *Keys) layers(ctx context.Context, f Fetcher, image format.Digest) ([]layer, error) {
	b, err := f.Manifest(ctx, Tag(image), maxManifest)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil, fmt.Errorf("there is no tag %s: %w", Tag(image), ErrNotSigned)
	case errors.Is(err, format.ErrTooLarge):
		return nil, fmt.Errorf("what is tagged %s has more than %d bytes: %w", Tag(image), maxManifest, ErrNotSigned)
	case err != nil:
		return nil, fmt.Errorf("read the signatures of %v: %w", image, err)
	}
	var manifest struct {
		Layers []layer `json:"layers"`
	}
	if err := json.Unmarshal(b, &manifest); err != nil {
		return nil, fmt.Errorf("what is tagged %s is no manifest: %w", Tag(image), ErrNotSigned)
	}
	var layers []layer
	for _, l := range manifest.Layers {
		if l.MediaType == mediaTypePayload && l.Annotations[annotationSignature] != "" {
			layers = append(layers, l)
		}
	}
	if len(layers) == 0 {
		return nil, fmt.Errorf("what is tagged %s holds no signature: %w", Tag(image), ErrNotSigned)
	}
	if len(layers) > maxSignatures {
		return nil, fmt.Errorf("what is tagged %s holds %d signatures, at most %d are looked at; remove old ones with cosign clean: %w", Tag(image), len(layers), maxSignatures, ErrNotSigned)
	}
	return layers, nil
}

// verifyLayer returns the fingerprint of the key that made the signature l. Nothing of the
// payload is believed before its signature is checked.
func (k *Keys) verifyLayer(ctx context.Context, f Fetcher, image format.Digest, l *layer) (string, error) {
	not := func(reason string) (string, error) { return "", fmt.Errorf("%s: %w", reason, ErrNotSigned) }
	digest, err := format.ParseDigest(l.Digest)
	if err != nil || l.Size < 0 || l.Size > maxPayload {
		return not("one has no payload that is read")
	}
	text := l.Annotations[annotationSignature]
	if len(text) > maxSignature {
		return not("one is too long")
	}
	sig, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return not("one is not in base64")
	}
	payload, err := f.Blob(ctx, digest, l.Size)
	if errors.Is(err, ErrNotFound) {
		return not("one lacks its payload")
	}
	if err != nil {
		return "", err
	}
	if int64(len(payload)) != l.Size || format.DigestOf(payload) != digest {
		return not("one has another payload than its digest says")
	}
	id, ok := k.signer(payload, sig)
	if !ok {
		return not("one is by another key, or is not for its payload")
	}
	if err := checkPayload(payload, image); err != nil {
		return not(err.Error())
	}
	return id, nil
}

// checkPayload accepts what is a signed statement that says that it is about the image.
func checkPayload(b []byte, image format.Digest) error {
	var p struct {
		Critical struct {
			Image struct {
				Digest string `json:"docker-manifest-digest"`
			} `json:"image"`
			Type string `json:"type"`
		} `json:"critical"`
	}
	switch err := json.Unmarshal(b, &p); {
	case err != nil:
		return errors.New("one is for something that is no JSON")
	case p.Critical.Type != payloadType:
		return errors.New("one is for something that is no image")
	case p.Critical.Image.Digest != image.String():
		return errors.New("one is for another image")
	}
	return nil
}

// summary says what is wrong with signatures, each reason once.
func summary(reasons []string) string {
	count := map[string]int{}
	var order []string
	for _, r := range reasons {
		if count[r]++; count[r] == 1 {
			order = append(order, r)
		}
	}
	var text []string
	for _, r := range order {
		if n := count[r]; n > 1 {
			r = fmt.Sprintf("%s (%d times)", r, n)
		}
		text = append(text, r)
	}
	return fmt.Sprintf("of %d signatures there, %s", len(reasons), strings.Join(text, "; "))
}
