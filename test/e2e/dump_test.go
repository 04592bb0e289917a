package e2e_test

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// How much of what there is a failure shows.
const (
	dumpTimeout    = 2 * time.Minute
	dumpPods       = 40
	dumpEvents     = 12
	dumpLogLines   = 60
	dumpLineLength = 800
)

// dumpFailed says, once for each part that has failed, what the cluster looks like.
func (s *suite) dumpFailed(ctx context.Context, t *testing.T) {
	t.Helper()
	if !t.Failed() || s.dumped[t.Name()] {
		return
	}
	s.failed, s.dumped[t.Name()] = true, true
	s.dump(ctx, func(text string) { t.Log(text) })
}

// dump writes what a person wants to see after a failure: the pods of all our namespaces, the driver's
// logs, those of the nodes. Pods of the test itself are described where it removes them.
func (s *suite) dump(ctx context.Context, write func(text string)) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dumpTimeout)
	defer cancel()
	namespaces, err := s.suiteNamespaces(ctx)
	if err != nil {
		write(err.Error())
	}
	if s.release != nil && !slices.Contains(namespaces, s.release.namespace) {
		namespaces = append(namespaces, s.release.namespace)
	}
	for _, namespace := range namespaces {
		list, err := s.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{Limit: dumpPods})
		if err != nil {
			write(fmt.Sprintf("list pods of %s: %v", namespace, err))
			continue
		}
		for i := range list.Items {
			write(s.describePod(ctx, &list.Items[i]))
		}
		if list.Continue != "" {
			write(fmt.Sprintf("(namespace %s has more pods)", namespace))
		}
	}
	if s.release != nil {
		write(s.driverLogs(ctx))
	}
	write("==== logs of the nodes\n" + s.machineLogs(ctx))
}

// driverLogs returns the ends of the logs of all drivers, and of those that were there before them.
func (s *suite) driverLogs(ctx context.Context) string {
	var text strings.Builder
	list, err := s.client.CoreV1().Pods(s.release.namespace).List(ctx, metav1.ListOptions{LabelSelector: driverSelector})
	if err != nil {
		return fmt.Sprintf("list the driver's pods: %v", err)
	}
	count := int64(dumpLogLines)
	for _, p := range list.Items {
		for _, previous := range []bool{true, false} {
			b, err := s.client.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{
				Container: "driver", TailLines: &count, Previous: previous,
			}).DoRaw(ctx)
			switch {
			case err != nil && previous:
				continue // as a rule there is none
			case err != nil:
				b = []byte(err.Error())
			}
			which := ""
			if previous {
				which = ", its container before this one"
			}
			fmt.Fprintf(&text, "==== log of %s on %s%s\n%s\n", p.Name, p.Spec.NodeName, which, tail(string(b), dumpLogLines))
		}
	}
	return text.String()
}

// describe is what kubectl describe says of a pod, for a test that has failed.
func (s *suite) describe(ctx context.Context, namespace, name string) string {
	p, err := s.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Sprintf("describe pod %s/%s: %v", namespace, name, err)
	}
	return s.describePod(ctx, p)
}

func (s *suite) describePod(ctx context.Context, p *corev1.Pod) string {
	var text strings.Builder
	fmt.Fprintf(&text, "==== pod %s/%s: %s\n", p.Namespace, p.Name, podState(p))
	for _, c := range p.Status.Conditions {
		if c.Status != corev1.ConditionTrue {
			fmt.Fprintf(&text, "  %s=%s %s %s\n", c.Type, c.Status, c.Reason, clip(c.Message))
		}
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if last := c.LastTerminationState.Terminated; last != nil {
			fmt.Fprintf(&text, "  %s ended before with %d: %s %s\n", c.Name, last.ExitCode, last.Reason, clip(last.Message))
		}
	}
	for _, v := range p.Spec.Volumes {
		if v.CSI != nil {
			fmt.Fprintf(&text, "  volume %s: %v\n", v.Name, v.CSI.VolumeAttributes)
		}
	}
	text.WriteString(s.pod(p.Namespace, p.Name).eventsText(ctx))
	return text.String()
}

// eventsText is the pod's events for people.
func (p *pod) eventsText(ctx context.Context) string {
	events, err := p.events(ctx)
	if err != nil {
		return "  " + err.Error() + "\n"
	}
	return eventsText(events)
}

func eventsText(events []corev1.Event) string {
	if len(events) == 0 {
		return "  no events\n"
	}
	var text strings.Builder
	if more := len(events) - dumpEvents; more > 0 {
		fmt.Fprintf(&text, "  (%d older events)\n", more)
		events = events[more:]
	}
	for _, e := range events {
		source := cmp.Or(e.Source.Component, e.ReportingController)
		count := ""
		if e.Count > 1 {
			count = fmt.Sprintf(" (%d times)", e.Count)
		}
		fmt.Fprintf(&text, "  %s %s %s from %s%s: %s\n", eventTime(e).Format(time.TimeOnly), e.Type, e.Reason, source, count, clip(e.Message))
	}
	return text.String()
}

// eventTime is when an event was last seen, whichever of its fields says so.
func eventTime(e corev1.Event) time.Time {
	switch {
	case e.Series != nil:
		return e.Series.LastObservedTime.Time
	case !e.LastTimestamp.IsZero():
		return e.LastTimestamp.Time
	case !e.EventTime.IsZero():
		return e.EventTime.Time
	default:
		return e.CreationTimestamp.Time
	}
}

// tail returns the last lines of a text, none of them too long.
func tail(text string, count int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(all) > count {
		all = append([]string{fmt.Sprintf("(%d lines before)", len(all)-count)}, all[len(all)-count:]...)
	}
	for i := range all {
		all[i] = clip(all[i])
	}
	return strings.Join(all, "\n")
}

func clip(line string) string {
	if len(line) > dumpLineLength {
		return strings.ToValidUTF8(line[:dumpLineLength], "") + "…"
	}
	return line
}
