package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// node is the CSI node service. Its methods return plain errors; the interceptor in
// server.go logs them and gives them their gRPC codes.
type node struct {
	csi.UnimplementedNodeServer
	d *Driver
}

var _ csi.NodeServer = (*node)(nil)

// NodePublishVolume makes an image appear at a target path.
func (n *node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := n.d.publish(ctx, req); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume removes a target path.
func (n *node) NodeUnpublishVolume(_ context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := n.d.unpublish(req); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetInfo returns the node's name. There is no limit to the number of volumes, and no
// topology.
func (n *node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: n.d.cfg.NodeID}, nil
}

// NodeGetCapabilities returns GET_VOLUME_STATS.
func (n *node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{Capabilities: []*csi.NodeServiceCapability{{
		Type: &csi.NodeServiceCapability_Rpc{
			Rpc: &csi.NodeServiceCapability_RPC{Type: csi.NodeServiceCapability_RPC_GET_VOLUME_STATS},
		},
	}}}, nil
}

// NodeGetVolumeStats returns the size of the image that a volume shows, from its index, so that
// the mount is not touched: all of it is used, nothing is available. Of a volume with a subPath it
// is the whole image's, because that is what the volume costs the node.
func (n *node) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	switch {
	case req.GetVolumeId() == "":
		return nil, fmt.Errorf("read request: no volume id: %w", ErrInvalid)
	case req.GetVolumePath() == "":
		return nil, fmt.Errorf("read request: no volume path: %w", ErrInvalid)
	}
	for _, vol := range n.d.volumes.all() {
		at := req.GetVolumePath() == vol.Args.TargetPath || req.GetVolumePath() == vol.Real
		if vol.Args.VolumeID != req.GetVolumeId() || !at {
			continue
		}
		if vol.pending {
			return nil, fmt.Errorf("get size of volume %s: it is half published or half unpublished: %w", req.GetVolumeId(), ErrBusy)
		}
		img, _, ok := n.d.mounts.lookup(ctx, vol.mount())
		if !ok {
			return nil, fmt.Errorf("get size of volume %s: its image is not mounted; publishing it again mounts it: %w", req.GetVolumeId(), ErrUnavailable)
		}
		s := img.Stats()
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
			{Unit: csi.VolumeUsage_BYTES, Total: int64(s.Bytes), Used: int64(s.Bytes)},
			{Unit: csi.VolumeUsage_INODES, Total: int64(s.Inodes), Used: int64(s.Inodes)},
		}}, nil
	}
	return nil, fmt.Errorf("get size of volume %s: it is not published at %s: %w", req.GetVolumeId(), req.GetVolumePath(), ErrNotFound)
}
