package builder

import (
	"slices"
	"sync"
)

// lookAhead does on goroutines of its own what the walker of a tree is going to ask for: the walker pushes
// tasks when it knows of them, and takes each when its turn comes. So what the walker finds does not
// depend on which of them was when. All methods but run are the walker's to call. A nil lookAhead does everything
// when it is taken.
type lookAhead struct {
	workers sync.WaitGroup

	mu      sync.Mutex // guards what follows, and the states of the tasks
	wake    sync.Cond
	stack   []*task // the next to be done is the last
	ahead   int     // tasks that are done and not taken
	stopped bool
}

// maxAhead bounds how many tasks are done and not taken. Each may have a directory open and know
// lookBatch names.
const maxAhead = 64

// task is something to be done once.
type task struct {
	do      func()
	started bool
	done    chan struct{} // closed when do has returned
}

func newTask(do func()) *task { return &task{do: do, done: make(chan struct{})} }

// startLookAhead starts the goroutines, which run until stop.
func startLookAhead(workers int) *lookAhead {
	l := new(lookAhead)
	l.wake.L = &l.mu
	for range workers {
		l.workers.Go(l.run)
	}
	return l
}

// run does tasks until the end.
func (l *lookAhead) run() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		for !l.stopped && (len(l.stack) == 0 || l.ahead >= maxAhead) {
			l.wake.Wait()
		}
		if l.stopped {
			return
		}
		t := l.stack[len(l.stack)-1]
		l.stack = l.stack[:len(l.stack)-1]
		t.started = true
		l.ahead++
		l.mu.Unlock()
		t.do()
		close(t.done)
		l.mu.Lock()
	}
}

// push says which tasks come next, in this order, before those that were pushed earlier.
func (l *lookAhead) push(tasks ...*task) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range slices.Backward(tasks) {
		l.stack = append(l.stack, t)
	}
	l.wake.Broadcast()
}

// take returns when a task is done, which is done here and now if nobody has begun.
func (l *lookAhead) take(t *task) {
	if l.cancel(t) {
		t.do()
	}
}

// cancel sees to it that nobody begins a task any more. It waits for who has, and reports whether nobody had.
func (l *lookAhead) cancel(t *task) bool {
	if l == nil {
		return true
	}
	l.mu.Lock()
	if !t.started {
		t.started = true
		// It is one of the last, unless the walk has failed.
		i := len(l.stack) - 1
		for ; l.stack[i] != t; i-- {
		}
		l.stack = slices.Delete(l.stack, i, i+1)
		l.mu.Unlock()
		return true
	}
	l.mu.Unlock()
	<-t.done
	l.mu.Lock()
	l.ahead--
	l.mu.Unlock()
	l.wake.Signal()
	return false
}

// stop ends the goroutines and waits for them. All tasks have been taken or canceled.
func (l *lookAhead) stop() {
	if l == nil {
		return
	}
	l.mu.Lock()
	l.stopped = true
	l.mu.Unlock()
	l.wake.Broadcast()
	l.workers.Wait()
}
