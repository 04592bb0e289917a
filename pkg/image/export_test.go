package image

// CachedBytes returns the length of all that is in the chunk cache.
func (im *Image) CachedBytes() int64 {
	im.cache.mu.Lock()
	defer im.cache.mu.Unlock()
	return im.cache.bytes
}
