package driver_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// TestPullOutlivesCall: the first call gives up 5 s before its deadline with the progress,
// a later one gets the result of the same pull. Time is synctest's.
func TestPullOutlivesCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pulls := driver.NewPulls()
		defer pulls.Close()
		want := format.DigestOf([]byte("image"))
		var began atomic.Int32
		pull := func(ctx context.Context, report func(string)) (format.Digest, error) {
			began.Add(1)
			report("37% of 4.1 GiB")
			select {
			case <-time.After(3 * time.Minute):
				return want, nil
			case <-ctx.Done():
				return format.Digest{}, ctx.Err()
			}
		}
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		_, err := pulls.Do(ctx, "app", "", pull)
		if !errors.Is(err, driver.ErrBusy) || !strings.Contains(err.Error(), "37% of 4.1 GiB") {
			t.Errorf("got %v, want ErrBusy with the progress", err)
		}
		if took := time.Since(begin); took != 115*time.Second {
			t.Errorf("answered after %v, want 5 s before the deadline", took)
		}
		ctx, cancel = context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		got, err := pulls.Do(ctx, "app", "", pull)
		if err != nil || got != want {
			t.Errorf("got %v, %v; want %v", got, err, want)
		}
		if n := began.Load(); n != 1 {
			t.Errorf("%d pulls began, want 1", n)
		}
		// A success is not remembered: the next call asks the registry itself.
		if _, err := pulls.Do(t.Context(), "app", "", pull); !errors.Is(err, driver.ErrBusy) || began.Load() != 2 {
			t.Errorf("got %v after %d pulls, want a second pull, still running", err, began.Load())
		}
	})
}

// TestPullFailureIsToldOnce: those who wait, or else the next call, learn the cause; then a
// pull begins anew.
func TestPullFailureIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pulls := driver.NewPulls()
		defer pulls.Close()
		cause := errors.New("no space")
		var began atomic.Int32
		fail := func(context.Context, func(string)) (format.Digest, error) {
			began.Add(1)
			time.Sleep(10 * time.Second)
			return format.Digest{}, cause
		}
		short := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
			defer cancel()
			_, err := pulls.Do(ctx, "app", "", fail)
			return err
		}
		if err := short(); !errors.Is(err, driver.ErrBusy) {
			t.Errorf("while it runs: got %v, want ErrBusy", err)
		}
		time.Sleep(time.Minute)
		if err := short(); !errors.Is(err, cause) || began.Load() != 1 {
			t.Errorf("after it failed: got %v after %d pulls, want the cause of the first", err, began.Load())
		}
		if err := short(); !errors.Is(err, driver.ErrBusy) || began.Load() != 2 {
			t.Errorf("after it was told: got %v after %d pulls, want a second one", err, began.Load())
		}
		time.Sleep(time.Hour)
		if err := short(); !errors.Is(err, driver.ErrBusy) || began.Load() != 3 {
			t.Errorf("an hour later: got %v after %d pulls, want a third one", err, began.Load())
		}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if _, err := pulls.Do(t.Context(), "app", "", fail); !errors.Is(err, cause) {
					t.Errorf("waiting: got %v, want the cause", err)
				}
			})
		}
		wg.Wait()
		if began.Load() != 3 {
			t.Errorf("%d pulls began, want 3: all waited for the same", began.Load())
		}
	})
}

// TestPullsNobodyAsksFor: a pull whose pod is gone ends, even one that the registry would draw
// out for ever, and so does the memory of one that failed. One that is asked for goes on.
func TestPullsNobodyAsksFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pulls := driver.NewPulls()
		defer pulls.Close()
		var ended atomic.Int32
		endless := func(ctx context.Context, _ func(string)) (format.Digest, error) {
			<-ctx.Done()
			ended.Add(1)
			return format.Digest{}, ctx.Err()
		}
		ask := func(what string, fn func(context.Context, func(string)) (format.Digest, error)) error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			_, err := pulls.Do(ctx, what, "", fn)
			return err
		}
		for range 10 {
			if err := ask("app", endless); !errors.Is(err, driver.ErrBusy) || ended.Load() != 0 {
				t.Fatalf("got %v with %d pulls ended, want ErrBusy and the same pull", err, ended.Load())
			}
			time.Sleep(4 * time.Minute) // longer than kubelet ever waits
		}
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if ended.Load() != 1 || pulls.Len() != 0 {
			t.Errorf("%d pulls ended and %d are kept, want it ended and forgotten", ended.Load(), pulls.Len())
		}
		if err := ask("app", endless); !errors.Is(err, driver.ErrBusy) {
			t.Errorf("asked for again: got %v, want ErrBusy", err)
		}
		late := func(context.Context, func(string)) (format.Digest, error) {
			time.Sleep(3 * time.Minute)
			return format.Digest{}, errors.New("no space")
		}
		if err := ask("late", late); !errors.Is(err, driver.ErrBusy) || pulls.Len() != 2 {
			t.Errorf("got %v and %d pulls, want ErrBusy and 2", err, pulls.Len())
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if ended.Load() != 2 || pulls.Len() != 0 {
			t.Errorf("%d pulls ended and %d are kept, want 2 and none", ended.Load(), pulls.Len())
		}
	})
}

// TestPullsAreApart: other credentials are another pull.
func TestPullsAreApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pulls := driver.NewPulls()
		defer pulls.Close()
		var began atomic.Int32
		var wg sync.WaitGroup
		for _, identity := range []string{"", "a", "b", "a"} {
			wg.Go(func() {
				_, err := pulls.Do(t.Context(), "app", identity, func(context.Context, func(string)) (format.Digest, error) {
					began.Add(1)
					time.Sleep(time.Second)
					return format.Digest{}, nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if began.Load() != 3 {
			t.Errorf("%d pulls began, want 3", began.Load())
		}
	})
}

// TestPullsClose: closing cancels what runs, waits for it, and refuses what comes later.
func TestPullsClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pulls := driver.NewPulls()
		var ended atomic.Bool
		pull := func(ctx context.Context, _ func(string)) (format.Digest, error) {
			<-ctx.Done()
			ended.Store(true)
			return format.Digest{}, ctx.Err()
		}
		result := make(chan error)
		go func() {
			_, err := pulls.Do(t.Context(), "app", "", pull)
			result <- err
		}()
		synctest.Wait()
		go pulls.Close()
		if err := <-result; !errors.Is(err, driver.ErrUnavailable) {
			t.Errorf("got %v, want ErrUnavailable", err)
		}
		if !ended.Load() {
			t.Error("the pull was not waited for")
		}
		if _, err := pulls.Do(t.Context(), "app", "", pull); !errors.Is(err, driver.ErrUnavailable) {
			t.Errorf("after close: got %v, want ErrUnavailable", err)
		}
	})
}

func TestPullPanics(t *testing.T) {
	pulls := driver.NewPulls()
	defer pulls.Close()
	_, err := pulls.Do(t.Context(), "app", "", func(context.Context, func(string)) (format.Digest, error) { panic("boom") })
	if err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("got %v, want the panic as an error", err)
	}
}

func TestHumanBytes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 4402341478: "4.1 GiB", 5 << 40: "5.0 TiB"} {
		if got := driver.HumanBytes(n); got != want {
			t.Errorf("HumanBytes(%d) = %q, want %q", n, got, want)
		}
	}
}
