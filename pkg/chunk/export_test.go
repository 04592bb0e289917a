package chunk

// Gear returns the table of the rolling hash.
func Gear() [256]uint64 { return gear }
