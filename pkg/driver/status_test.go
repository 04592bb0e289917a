package driver_test

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func TestCodeOf(t *testing.T) {
	tests := []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{driver.ErrInvalid, codes.InvalidArgument},
		{registry.ErrInvalidReference, codes.InvalidArgument},
		{format.ErrNotPuzzleFS, codes.InvalidArgument},
		{driver.ErrExists, codes.AlreadyExists},
		{driver.ErrNotFound, codes.NotFound},
		{registry.ErrNotFound, codes.NotFound},
		{registry.ErrUnauthorized, codes.Unauthenticated},
		{registry.ErrForbidden, codes.PermissionDenied},
		{driver.ErrDenied, codes.PermissionDenied},
		{fmt.Errorf("%w: %w", format.ErrTooLarge, driver.ErrDenied), codes.PermissionDenied},
		{registry.ErrUnavailable, codes.Unavailable},
		{registry.ErrRateLimited, codes.Unavailable},
		{driver.ErrUnavailable, codes.Unavailable},
		{driver.ErrBusy, codes.Aborted},
		{driver.ErrMismatch, codes.DataLoss},
		{store.ErrDigestMismatch, codes.DataLoss},
		{format.ErrCorrupt, codes.DataLoss},
		{syscall.ENOSPC, codes.ResourceExhausted},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{errors.New("anything else"), codes.Internal},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.err), func(t *testing.T) {
			err := tt.err
			if err != nil {
				err = fmt.Errorf("pull registry.example/app: %w", err)
			}
			if got := driver.CodeOf(err); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
