package store

// Step names a point in an operation that changes the layout. Config.Fault is called at
// each of them, so that tests can fail or kill a process exactly there.
type Step string

// The steps, in the order in which creating, putting, tagging and collecting pass them.
const (
	// StepLayoutMarked: oci-layout of a new layout has its name; nothing else is there.
	StepLayoutMarked Step = "layout-marked"
	// StepLayoutBlobs: the blob directory of a new layout is there, index.json is not.
	StepLayoutBlobs Step = "layout-blobs"
	// StepBlobTemp: a file without a name is about to be opened. The error EOPNOTSUPP has
	// the effect it has when a file system returns it: files with temporary names are used.
	StepBlobTemp Step = "blob-temp"
	// StepBlobWritten: a blob's bytes are written, but not under its name.
	StepBlobWritten Step = "blob-written"
	// StepBlobNamed: a blob that is to replace a torn one has a temporary name.
	StepBlobNamed Step = "blob-named"
	// StepBlobLinked: a blob has its name.
	StepBlobLinked Step = "blob-linked"
	// StepSynced: all blobs are durable, the index is unchanged.
	StepSynced Step = "synced"
	// StepIndexLocked: the lock is held, the index is unchanged.
	StepIndexLocked Step = "index-locked"
	// StepIndexTempWritten: the new index is written under a temporary name.
	StepIndexTempWritten Step = "index-temp-written" //nolint:gosec // no credential
	// StepIndexTempSynced: and it is durable.
	StepIndexTempSynced Step = "index-temp-synced"
	// StepIndexRenamed: the new index has its name, which may not be durable yet.
	StepIndexRenamed Step = "index-renamed"
	// StepCollectLocked: a collection has the lock of the pins and is about to evict images.
	StepCollectLocked Step = "collect-locked"
	// StepCollectForgotten: the caller forgot the images, they have their tags.
	StepCollectForgotten Step = "collect-forgotten"
	// StepCollectUntagged: the images have no tags any more, and all of their blobs.
	StepCollectUntagged Step = "collect-untagged"
	// StepCollectRemoved: one more blob is gone; the lock is held.
	StepCollectRemoved Step = "collect-removed"
	// StepCollectBatch: the lock is free between two batches of blobs, or after the last.
	StepCollectBatch Step = "collect-batch"
)

// at reports that step was reached and returns the error that is to be taken for the next
// operation's.
func (s *Store) at(step Step) error {
	if s.fault == nil {
		return nil
	}
	return s.fault(step)
}
