package e2e_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// podSecurity is a Pod Security Standard that a namespace enforces.
type podSecurity string

const (
	privilegedPods podSecurity = "privileged"
	baselinePods   podSecurity = "baseline"
	restrictedPods podSecurity = "restricted"
)

// namespace makes a namespace for the test, whose name begins like name, and removes it when the test
// ends, with all that is in it. What still uses the driver then is waited for.
func (s *suite) namespace(ctx context.Context, t *testing.T, name string, security podSecurity) string {
	t.Helper()
	made, err := s.makeNamespace(ctx, "", suiteNamespace+"-"+name+"-", security)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() && s.settings.keep {
			return
		}
		if err := s.removeNamespace(context.WithoutCancel(ctx), made); err != nil {
			t.Error(err)
		}
	})
	return made
}

// makeNamespace makes a namespace, and waits until pods can be made in it.
func (s *suite) makeNamespace(ctx context.Context, name, generate string, security podSecurity) (string, error) {
	ns, err := s.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: name, GenerateName: generate,
		Labels: map[string]string{suiteLabel: "true", "pod-security.kubernetes.io/enforce": string(security)},
	}}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("create namespace %s%s: %w", name, generate, err)
	}
	return ns.Name, s.awaitServiceAccount(ctx, ns.Name)
}

// awaitServiceAccount waits for what pods need and controllers make soon after the namespace.
func (s *suite) awaitServiceAccount(ctx context.Context, namespace string) error {
	return await(ctx, patience, "the service account default in "+namespace, func(ctx context.Context) (bool, string, error) {
		_, err := s.client.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return false, "none", nil
		}
		return err == nil, "", err
	})
}

// removeNamespace deletes a namespace and waits until it is gone.
func (s *suite) removeNamespace(ctx context.Context, name string) error {
	err := s.client.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete namespace %s: %w", name, err)
	}
	return await(ctx, slowPatience, "the end of namespace "+name, func(ctx context.Context) (bool, string, error) {
		ns, err := s.client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return true, "", nil
		}
		if err != nil {
			return false, "", err
		}
		var why []string
		for _, c := range ns.Status.Conditions {
			if c.Status == corev1.ConditionTrue {
				why = append(why, c.Message)
			}
		}
		return false, strings.Join(why, "; "), nil
	})
}

// removeNamespaces removes all namespaces of the suite but that of the driver, without which kubelet could
// not unmount what is in them.
func (s *suite) removeNamespaces(ctx context.Context) error {
	names, err := s.suiteNamespaces(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == s.release.namespace {
			continue
		}
		if err := s.removeNamespace(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// suiteNamespaces returns the names of all namespaces that the suite has made.
func (s *suite) suiteNamespaces(ctx context.Context) ([]string, error) {
	list, err := s.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{LabelSelector: suiteLabel})
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var names []string
	for _, ns := range list.Items {
		names = append(names, ns.Name)
	}
	return names, nil
}
