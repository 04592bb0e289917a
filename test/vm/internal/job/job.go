// Package job is what the host and the virtual machine say to each other. The host puts a [Job] into the
// machine's first file system. The machine connects a virtio port of the name [Port] to the host
// and sends a gob stream of [Message] values, the last of which has the exit code; the host answers that
// one with a byte, so that the machine knows that all has arrived before it turns itself off.
package job

// Path is where the machine finds the Job, as JSON.
const Path = "/job.json"

// Port is the name of the virtio port.
const Port = "job"

// Message is what the machine sends.
type Message struct {
	// Output is a piece of what the program writes to stdout and stderr.
	Output []byte
	// Ended says that the program has ended, with the exit code Code. No message follows.
	Ended bool
	Code  int
}

// Exit codes beside the program's own.
const (
	// TimedOut says that the machine was ended by its time limit.
	TimedOut = 124
	// Broken says that there is no result: the machine could not be started, or did not get
	// as far as the program.
	Broken = 125
)

// Job is what the machine is to do.
type Job struct {
	// Program is a path in the machine and its arguments. It runs as root.
	Program []string
	// Dir is its working directory, which is made.
	Dir string
	// Modules are the paths of kernel modules to load, in this order.
	Modules []string
	// Disk is a block device with an ext4 that has fs-verity; it is mounted on Mount.
	Disk string
}

// Mount is where the disk is mounted; temporary files go to its directory tmp.
const Mount = "/verity"

// Plain is where a tmpfs is mounted, which has no fs-verity.
const Plain = "/plain"

// Environment variables of the program.
const (
	// EnvDisk names the block device below the file system of temporary files.
	EnvDisk = "VM_DISK"
	// EnvPlain names a directory on a file system without fs-verity.
	EnvPlain = "VM_PLAIN"
	// EnvRequire is 1: no fs-verity is a failure, not a reason to test something else.
	EnvRequire = "REQUIRE_FSVERITY"
)
