package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"unicode/utf8"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// maxIndexSize bounds an index.json, in bytes: about 200,000 tags.
const maxIndexSize = 64 << 20

// index is a decoded index.json. What this package does not know in it is kept as it is:
// other tools may use the same layout.
type index struct {
	// fields has the members of the document, but for "manifests".
	fields  map[string]json.RawMessage
	entries []indexEntry
}

// indexEntry is an element of "manifests".
type indexEntry struct {
	raw json.RawMessage
	// tag is the annotation ref.name, "" where there is none.
	tag string
	// desc is the entry as far as PuzzleFS needs it. foreign, where it is not nil, says
	// why the entry is none of ours, and desc is not to be used then.
	desc    format.Descriptor
	foreign error
}

// newIndex returns the index of an empty OCI layout.
func newIndex() *index {
	return &index{fields: map[string]json.RawMessage{"schemaVersion": json.RawMessage("2")}}
}

// parseIndex decodes an index.json of the given layout. It fails with format.ErrCorrupt.
// Entries that are not ours, or broken, are no error.
func parseIndex(b []byte, layout Layout) (*index, error) {
	fields, err := decodeObject(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, format.ErrCorrupt)
	}
	version, want := 0, 2
	if layout == LayoutPrivate {
		want = -1
	}
	if err := json.Unmarshal(fields["schemaVersion"], &version); err != nil || version != want {
		return nil, fmt.Errorf("its schemaVersion is not %d: %w", want, format.ErrCorrupt)
	}
	x := &index{fields: fields}
	if raw, ok := fields["manifests"]; ok {
		var entries []json.RawMessage // null, as some tools write, is empty
		if err := json.Unmarshal(raw, &entries); err != nil {
			return nil, fmt.Errorf("its manifests are no list: %w", format.ErrCorrupt)
		}
		delete(fields, "manifests")
		for _, raw := range entries {
			x.entries = append(x.entries, parseEntry(raw, layout))
		}
	}
	return x, nil
}

// parseEntry decodes an entry as far as it is ours.
func parseEntry(raw json.RawMessage, layout Layout) indexEntry {
	e := indexEntry{raw: raw}
	fields, err := decodeObject(raw)
	if err != nil {
		e.foreign = fmt.Errorf("its index entry is broken: %w: %w", err, format.ErrCorrupt)
		return e
	}
	mediaTypeKey, mediaType := "mediaType", format.MediaTypeManifest
	if layout == LayoutPrivate {
		mediaTypeKey, mediaType = "media_type", format.MediaTypeRootfs
	}
	// The tag comes first: a broken entry is known by it.
	if raw, ok := fields["annotations"]; ok {
		err = json.Unmarshal(raw, &e.desc.Annotations)
		e.tag = e.desc.Annotations[format.AnnotationRefName]
	}
	var digest string
	for _, field := range []struct {
		key  string
		into any
	}{
		{mediaTypeKey, &e.desc.MediaType},
		{"digest", &digest},
		{"size", &e.desc.Size},
		{"platform", &e.desc.Platform},
	} {
		if raw, ok := fields[field.key]; ok && err == nil {
			err = json.Unmarshal(raw, field.into)
		}
	}
	switch {
	case err != nil:
		e.foreign = fmt.Errorf("its index entry is broken: %w: %w", err, format.ErrCorrupt)
		return e
	case e.desc.MediaType != mediaType:
		e.foreign = fmt.Errorf("it names a %.100q, want %s: %w", e.desc.MediaType, mediaType, format.ErrNotPuzzleFS)
		return e
	case e.desc.Size < 0:
		e.foreign = fmt.Errorf("its index entry has the negative size %d: %w", e.desc.Size, format.ErrCorrupt)
		return e
	}
	if e.desc.Digest, err = format.ParseDigest(digest); err != nil {
		e.foreign = err
	}
	return e
}

// encode returns the document with its members sorted and without white space outside of
// what is kept as it is: the bytes that the reference writes, if all of it is its own.
func (x *index) encode() ([]byte, error) {
	var buf bytes.Buffer
	keys := append(slices.Collect(maps.Keys(x.fields)), "manifests")
	slices.Sort(keys)
	buf.WriteByte('{')
	for i, key := range keys {
		if i > 0 {
			buf.WriteByte(',')
		}
		name, err := format.CanonicalJSON(key)
		if err != nil {
			return nil, err
		}
		buf.Write(name)
		buf.WriteByte(':')
		if key != "manifests" {
			buf.Write(x.fields[key])
			continue
		}
		buf.WriteByte('[')
		for j, e := range x.entries {
			if j > 0 {
				buf.WriteByte(',')
			}
			buf.Write(e.raw)
		}
		buf.WriteByte(']')
	}
	buf.WriteByte('}')
	return buf.Bytes(), nil
}

// remove removes the entries of a tag, ours or not, and says whether there were any.
func (x *index) remove(tag string) bool {
	n := len(x.entries)
	x.entries = slices.DeleteFunc(x.entries, func(e indexEntry) bool { return e.tag == tag })
	return len(x.entries) < n
}

// removeImages removes our entries that name one of these manifests, whatever their tags.
func (x *index) removeImages(images map[format.Digest]bool) {
	x.entries = slices.DeleteFunc(x.entries, func(e indexEntry) bool { return e.foreign == nil && images[e.desc.Digest] })
}

// add appends an entry for an OCI layout.
func (x *index) add(d format.Descriptor) error {
	raw, err := format.CanonicalJSON(d)
	if err != nil {
		return err
	}
	x.entries = append(x.entries, indexEntry{raw: raw, tag: d.Annotations[format.AnnotationRefName], desc: d})
	return nil
}

// find returns the first entry of a tag, as the reference does.
func (x *index) find(tag string) (indexEntry, bool) {
	i := slices.IndexFunc(x.entries, func(e indexEntry) bool { return e.tag == tag })
	if i < 0 {
		return indexEntry{}, false
	}
	return x.entries[i], true
}

// tags returns our entries that have a tag.
func (x *index) tags() []format.Descriptor {
	var tags []format.Descriptor
	for _, e := range x.entries {
		if e.foreign == nil && e.tag != "" {
			tags = append(tags, e.desc)
		}
	}
	return tags
}

// decodeObject decodes one JSON object into its members, whose bytes are kept. Unlike the
// json package's own decoding into types it takes names as they are (not in any case), and
// refuses a name that occurs twice: which of the two counts differs among readers.
func decodeObject(b []byte) (map[string]json.RawMessage, error) {
	if !utf8.Valid(b) || !json.Valid(b) {
		return nil, errors.New("it is not JSON")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("it is not a JSON object")
	}
	fields := make(map[string]json.RawMessage)
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, err
		}
		key, ok := t.(string)
		if !ok {
			return nil, fmt.Errorf("unexpected %v", t)
		}
		if _, dup := fields[key]; dup {
			return nil, fmt.Errorf("%.100q occurs twice", key)
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, err
		}
		fields[key] = raw
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows the JSON object")
	}
	return fields, nil
}
