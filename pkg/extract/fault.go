package extract

// Step names a point in an extraction. Config.Fault is called at each of them, so that tests
// can fail or kill a process exactly there.
type Step string

// The steps, in the order in which an extraction passes them; those of names come again for
// every name.
const (
	// StepSurveyed: what is there was looked at, and nothing was changed.
	StepSurveyed Step = "surveyed"
	// StepDirTaken: a directory that was there belongs to the extraction while it works in it.
	StepDirTaken Step = "dir-taken"
	// StepDirMade: a new directory has its name, but not its attributes.
	StepDirMade Step = "dir-made"
	// StepCleared: what was in the way of a directory, or an empty directory that was in the
	// way of something else, is gone.
	StepCleared Step = "cleared"
	// StepEntryMade: a symlink, fifo, socket or device has a name, but not its attributes.
	StepEntryMade Step = "entry-made"
	// StepFileTemp: a file without a name is about to be opened. The error EOPNOTSUPP has
	// the effect it has when a file system returns it: files with temporary names are used.
	StepFileTemp Step = "file-temp"
	// StepFileWritten: a file has its content and its attributes, but not its name.
	StepFileWritten Step = "file-written"
	// StepTempNamed: what is to replace something has a temporary name.
	StepTempNamed Step = "temp-named"
	// StepReplaced: and now the name of what it replaces.
	StepReplaced Step = "replaced"
	// StepFileReused: a file that was there has the right content; its attributes may be wrong.
	StepFileReused Step = "file-reused"
	// StepLinked: a further name of an inode is there.
	StepLinked Step = "linked"
	// StepDirFinished: a directory is complete and has its attributes.
	StepDirFinished Step = "dir-finished"
)

// at reports that step was reached and returns the error that is to be taken for the next
// operation's.
func (x *extractor) at(step Step) error {
	if x.cfg.Fault == nil {
		return nil
	}
	return x.cfg.Fault(step)
}
