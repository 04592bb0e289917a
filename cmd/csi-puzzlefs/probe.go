package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
)

const (
	// probeInterval is the time between two rounds of questions.
	probeInterval = time.Second
	// probeRoundTimeout bounds a round, so that one address that does not answer leaves time
	// for others to come and go.
	probeRoundTimeout = 10 * time.Second
	// probeMaxAnswer is how much of a bad answer an error repeats.
	probeMaxAnswer = 500
)

// probed is what probe prints with --json.
type probed struct {
	Ready   []netip.Addr `json:"ready"`
	Seconds float64      `json:"seconds"`
}

func newProbeCommand() *cobra.Command {
	var timeout time.Duration
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "probe URL",
		Short: "Wait until drivers are ready",
		Long: `Send GET to every address that the host of URL has, again and again, until all of them answer 200
in the same round, and print them. With the name of a headless Service these are the drivers of all nodes:
that is what the chart's test does. Fails after --timeout with what each of the others answered.

--json prints the addresses as "ready", and "seconds".`,
		Example: `  csi-puzzlefs probe --timeout 30s http://localhost:9809/readyz`,
		Args:    exactArgs("URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			started := time.Now()
			target, err := url.Parse(args[0])
			if err != nil || target.Scheme != "http" || target.Hostname() == "" {
				return usagef(cmd, "probe %q: want http://HOST[:PORT]/PATH", args[0])
			}
			if timeout <= 0 {
				return usagef(cmd, "--timeout %s: want more than nothing", timeout)
			}
			addrs, err := waitReady(cmd.Context(), target, timeout)
			if err != nil {
				return fmt.Errorf("probe %s: %w", target, err)
			}
			return printResult(cmd, asJSON, probed{addrs, secondsSince(started)}, func(w io.Writer) {
				for _, addr := range addrs {
					fmt.Fprintf(w, "%s is ready\n", addr)
				}
			})
		},
	}
	jsonFlag(cmd, &asJSON)
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

// waitReady returns the addresses of target's host as soon as all of them answer 200. The round
// that is under way after timeout is the last one.
func waitReady(ctx context.Context, target *url.URL, timeout time.Duration) ([]netip.Addr, error) {
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	for {
		addrs, err := probeRound(ctx, target)
		if err == nil {
			return addrs, nil
		}
		select {
		case <-time.After(probeInterval):
		case <-deadline.C:
			return nil, fmt.Errorf("not ready after %s: %w", timeout, err)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}

// probeRound looks up the addresses of target's host and asks all of them.
func probeRound(ctx context.Context, target *url.URL) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, probeRoundTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", target.Hostname())
	if err != nil {
		return nil, err
	}
	for i, addr := range addrs {
		addrs[i] = addr.Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, probeAll(ctx, target, addrs)
}

// probeAll asks all addresses at the same time and returns what those answered that are not ready.
func probeAll(ctx context.Context, target *url.URL, addrs []netip.Addr) error {
	errs := make([]error, len(addrs))
	var asked sync.WaitGroup
	for i, addr := range addrs {
		asked.Go(func() {
			if err := probeOne(ctx, target, addr); err != nil {
				errs[i] = fmt.Errorf("%s: %w", addr, err)
			}
		})
	}
	asked.Wait()
	return errors.Join(errs...)
}

// probeOne asks one address of target's host, without a proxy and without following redirects.
func probeOne(ctx context.Context, target *url.URL, addr netip.Addr) error {
	port := target.Port()
	if port == "" {
		port = "80"
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, net.JoinHostPort(addr.String(), port))
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		answer, err := io.ReadAll(io.LimitReader(resp.Body, probeMaxAnswer))
		return errors.Join(fmt.Errorf("answered %s: %s", resp.Status, strings.TrimSpace(string(answer))), err)
	}
	return nil
}
