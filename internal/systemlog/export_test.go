package systemlog

// Waiting returns how many records wait to be sent.
func Waiting(h *Handler) int { return len(h.shared.queue) }
