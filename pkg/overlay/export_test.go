package overlay

// MountByName is Mount as kernels before 6.13 need it.
func MountByName(cfg Config) (*Overlay, error) { return mount(&cfg, layersByName) }

// SplitLower is splitLower.
func SplitLower(list string) []string { return splitLower(list) }
