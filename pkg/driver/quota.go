package driver

import (
	"fmt"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
)

// ParseQuantity parses a number of bytes as Kubernetes writes it: "10Gi", "500M", "1e9".
func ParseQuantity(text string) (int64, error) {
	q, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, fmt.Errorf("read quantity %q: want a number of bytes such as 10Gi or 500M", text)
	}
	// Value says the largest number for what is larger.
	if n := q.Value(); n >= 0 {
		return n, nil
	}
	return 0, fmt.Errorf("read quantity %q: want 0 or more bytes", text)
}

// Reserve is how much of a disk is to stay free: Bytes, or else Percent of its size, 0 to 100.
type Reserve struct {
	Bytes   int64
	Percent float64
}

// ParseReserve parses a number of bytes, or a percentage: "5Gi", "10%".
func ParseReserve(text string) (Reserve, error) {
	number, percentage := strings.CutSuffix(text, "%")
	if !percentage {
		n, err := ParseQuantity(text)
		if err != nil {
			return Reserve{}, fmt.Errorf("%w, or a percentage such as 10%%", err)
		}
		return Reserve{Bytes: n}, nil
	}
	p, err := strconv.ParseFloat(number, 64)
	if err != nil || !(p >= 0 && p <= 100) {
		return Reserve{}, fmt.Errorf("read percentage %q: want 0%% to 100%%", text)
	}
	return Reserve{Percent: p}, nil
}

// of returns the bytes for a disk of the given size.
func (r Reserve) of(total int64) int64 {
	if r.Bytes > 0 {
		return r.Bytes
	}
	return int64(float64(total) / 100 * r.Percent)
}

// validate checks a Reserve of a Config.
func (r Reserve) validate() error {
	if r.Bytes < 0 || !(r.Percent >= 0 && r.Percent <= 100) {
		return fmt.Errorf("a reserve of %d bytes or %g%% of the disk; give 0 or more bytes, or 0%% to 100%%", r.Bytes, r.Percent)
	}
	return nil
}
