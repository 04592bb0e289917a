package driver

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

const (
	// answerMargin is how long before its deadline a call stops to wait for a pull. An
	// immediate Aborted would let kubelet's back-off add minutes.
	answerMargin = 5 * time.Second
	// defaultWait is for calls without a deadline: kubelet's limit less the margin.
	defaultWait = 2*time.Minute - answerMargin
	// unaskedAge is how long a pull goes on, or the cause of its failure is kept, while no
	// call asks for it. Kubelet comes back after two minutes at most: by then the pod is gone,
	// and its pull must not take up the network and the disk, for ever if the registry so wants.
	unaskedAge = 5 * time.Minute
)

// pullKey tells which pulls are one and the same: the same content, asked for with the
// same credentials. Others run beside each other and share what is in the store.
type pullKey struct {
	// what is the reference that is fetched, with the digest wanted.
	what string
	// identity is that of the credentials, see volumeSpec.
	identity string
	// fetch is false where only the permission to see the image is asked for (Never).
	fetch bool
}

// pullFunc fetches an image. It calls report with a text for people whenever it gets on.
type pullFunc func(ctx context.Context, report func(string)) (format.Digest, error)

// pulls runs pulls that outlive the calls that began them. Close ends and awaits them all.
type pulls struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex // guards running, what it says in pull, and that wg grows only before cancel
	running map[pullKey]*pull
}

// pull is one pull, running or failed and not yet told of.
type pull struct {
	progress atomic.Pointer[string]
	// audience is who asked for it.
	audience audience
	// cancel ends the pull.
	cancel context.CancelFunc
	// waiting is how many calls wait for it; unasked gives it up while none does. Both are
	// guarded by pulls.mu.
	waiting int
	unasked *time.Timer
	// done is closed when the rest is valid.
	done     chan struct{}
	manifest format.Digest
	err      error
}

func newPulls() *pulls {
	ctx, cancel := context.WithCancel(context.Background())
	return &pulls{ctx: ctx, cancel: cancel, running: map[pullKey]*pull{}}
}

// close cancels all pulls and waits for them. What they fetched stays in the store.
func (p *pulls) close() {
	p.mu.Lock()
	p.cancel()
	for _, pl := range p.running {
		if pl.unasked != nil {
			pl.unasked.Stop()
		}
	}
	p.mu.Unlock()
	p.wg.Wait()
}

// do returns the result of the pull named by key, beginning it with fn if there is none.
// If it is not done shortly before the deadline of ctx it fails with ErrBusy and the
// progress; the pull goes on. The cause of a failed pull is told to those who wait, or
// else to the next call; after that a call begins anew. A pull that no call asks for during
// unaskedAge is given up.
func (p *pulls) do(ctx context.Context, key pullKey, fn pullFunc) (format.Digest, error) {
	asking := callOf(ctx)
	pl, err := p.join(key, asking, fn) //nolint:contextcheck // a pull outlives the call that begins it
	if err != nil {
		return format.Digest{}, err
	}
	defer p.leave(key, pl)
	timer := time.NewTimer(patience(ctx))
	defer timer.Stop()
	select {
	case <-pl.done:
		p.forget(key, pl)
		if pl.audience.fetched.Load() {
			asking.fetched.Store(true)
		}
		return pl.manifest, pl.err
	case <-ctx.Done():
		return format.Digest{}, fmt.Errorf("wait for the pull of %s: %w", key.what, ctx.Err())
	case <-timer.C:
		return format.Digest{}, fmt.Errorf("%s: %w", *pl.progress.Load(), ErrBusy)
	}
}

// patience is how long a call waits: until answerMargin before its deadline, but at least
// half of the time it has.
func patience(ctx context.Context) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return defaultWait
	}
	left := time.Until(deadline)
	return left - min(answerMargin, left/2)
}

// join returns the pull named by key, begun if need be, for the caller to wait for. It ends
// with leave.
func (p *pulls) join(key pullKey, asking *call, fn pullFunc) (*pull, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return nil, fmt.Errorf("pull %s: the driver is stopping: %w", key.what, ErrUnavailable)
	}
	pl := p.running[key]
	if pl == nil {
		ctx, cancel := context.WithCancel(p.ctx)
		pl = &pull{cancel: cancel, done: make(chan struct{})}
		text := "pulling " + key.what + ": asking the registry"
		pl.progress.Store(&text)
		p.running[key] = pl
		ctx = withAudience(withCall(ctx, asking), &pl.audience)
		p.wg.Go(func() { p.run(ctx, key, pl, fn) })
	}
	pl.audience.add(asking.pod)
	pl.waiting++
	if pl.unasked != nil {
		pl.unasked.Stop()
	}
	return pl, nil
}

// leave says that a call does not wait any more.
func (p *pulls) leave(key pullKey, pl *pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pl.waiting--
	if pl.waiting == 0 && p.running[key] == pl {
		pl.unasked = time.AfterFunc(unaskedAge, func() { p.giveUp(key, pl) })
	}
}

// giveUp ends and forgets a pull that nobody asks for.
func (p *pulls) giveUp(key pullKey, pl *pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pl.waiting == 0 && p.running[key] == pl {
		delete(p.running, key)
		pl.cancel()
	}
}

func (p *pulls) run(ctx context.Context, key pullKey, pl *pull, fn pullFunc) {
	defer close(pl.done)
	defer pl.cancel()
	defer func() {
		if r := recover(); r != nil {
			pl.err = fmt.Errorf("pull %s: panic: %v\n%s", key.what, r, debug.Stack())
		}
		// A success needs no telling, and must not spare the next call its own check of
		// credentials. Neither does the failure that our own end causes.
		if pl.err == nil || p.ctx.Err() != nil {
			p.forget(key, pl)
		}
		if p.ctx.Err() != nil && errors.Is(pl.err, context.Canceled) {
			pl.err = fmt.Errorf("pull %s: the driver is stopping: %w", key.what, ErrUnavailable)
		}
	}()
	pl.manifest, pl.err = fn(ctx, func(text string) { pl.progress.Store(&text) })
}

func (p *pulls) forget(key pullKey, pl *pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running[key] == pl {
		delete(p.running, key)
		if pl.unasked != nil {
			pl.unasked.Stop()
		}
	}
}

// turns lets one pull at a time fetch the same content from the same repository, whosever
// credentials it uses, so that nothing is fetched twice. Pulls from other repositories do not
// wait for it: a slow one must not hold up the others. The zero value is ready.
type turns struct {
	mu sync.Mutex // guards m, and the users in it
	m  map[string]*turn
}

type turn struct {
	busy  chan struct{} // holds one element while somebody's turn lasts
	users int           // those whose turn it is or who wait for it
}

// take waits for the turn to fetch what, and returns the function that ends it.
func (t *turns) take(ctx context.Context, what string) (end func(), err error) {
	t.mu.Lock()
	if t.m == nil {
		t.m = map[string]*turn{}
	}
	one := t.m[what]
	if one == nil {
		one = &turn{busy: make(chan struct{}, 1)}
		t.m[what] = one
	}
	one.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if one.users--; one.users == 0 {
			delete(t.m, what)
		}
	}
	select {
	case one.busy <- struct{}{}:
		return func() { <-one.busy; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("wait for another pull of %s: %w", what, ctx.Err())
	}
}

// humanBytes writes a size with a binary unit, "4.1 GiB".
func humanBytes(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/(1<<10), 0
	for value >= 1024 && unit < 3 {
		value, unit = value/1024, unit+1
	}
	return fmt.Sprintf("%.1f %s", value, []string{"KiB", "MiB", "GiB", "TiB"}[unit])
}
