package store_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// getEarly returns what is wrong with a blob, whenever GetEarly finds out. see, if not nil, sees the bytes before.
func getEarly(ctx context.Context, s *store.Store, d format.VerityData, limit int64, see func([]byte)) error {
	b, verify, err := s.GetEarly(ctx, d, limit)
	if err != nil {
		return err
	}
	if see != nil {
		see(b)
	}
	return verify()
}

func TestGetEarly(t *testing.T) {
	s := create(t, store.Config{})
	for _, size := range []int{0, 1, 256 << 10, 256<<10 + 1, 3 << 20} {
		data := storetest.Data(1, size)
		d := format.VerityData{Digest: format.DigestOf(data)}
		must(t, s.Put(data, d.Digest))
		// Where the fs-verity digest is another one, or there is none, the other digest decides.
		for _, v := range []verity.Digest{{}, verity.Sum(data), {1}} {
			d.Verity = v
			must(t, getEarly(t.Context(), s, d, int64(size), func(b []byte) {
				if !bytes.Equal(b, data) {
					t.Errorf("%d bytes differ from those that were put", size)
				}
			}))
		}
		if size == 0 {
			continue
		}
		if err := getEarly(t.Context(), s, d, int64(size)-1, nil); !errors.Is(err, store.ErrTooLarge) {
			t.Errorf("%d bytes, of which one less may be: %v, want ErrTooLarge", size, err)
		}
	}
	if err := getEarly(t.Context(), s, format.VerityData{Digest: format.DigestOf([]byte("missing"))}, 1<<20, nil); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("missing blob: %v, want ErrNotFound", err)
	}
}

// Who gives up is told so, not that the blob is damaged, whether it was being read or hashed.
func TestGetEarlyIsInterrupted(t *testing.T) {
	s := create(t, store.Config{})
	data := storetest.Data(1, 8<<20)
	d := format.VerityData{Digest: format.DigestOf(data)}
	must(t, s.Put(data, d.Digest))
	ctx, cancel := context.WithCancel(t.Context())
	if err := getEarly(ctx, s, d, 1<<30, func([]byte) { cancel() }); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted after reading: %v, want nil or context.Canceled", err)
	}
	if err := getEarly(ctx, s, d, 1<<30, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted before: %v, want context.Canceled", err)
	}
}

// A store is closed when the last blob is verified.
func TestGetEarlyOfAClosedStore(t *testing.T) {
	s := create(t, store.Config{})
	data := storetest.Data(1, 1<<20)
	d := format.VerityData{Digest: format.DigestOf(data)}
	must(t, s.Put(data, d.Digest))
	_, verify, err := s.GetEarly(t.Context(), d, 1<<30)
	must(t, err)
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	must(t, verify())
	must(t, <-closed)
	if _, _, err := s.GetEarly(t.Context(), d, 1<<30); err == nil {
		t.Error("a closed store was read")
	}
}
