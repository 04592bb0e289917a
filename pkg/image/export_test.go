package image

// CachedBytes returns what the chunk cache says that it takes, and how much data it keeps
// from being collected.
func (im *Image) CachedBytes() (counted, kept int64) {
	im.cache.mu.Lock()
	defer im.cache.mu.Unlock()
	for _, e := range im.cache.entries {
		kept += int64(cap(entryOf(e).data))
	}
	return im.cache.bytes, kept
}
