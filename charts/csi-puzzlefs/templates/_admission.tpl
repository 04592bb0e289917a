{{/* The rules for a ValidatingAdmissionPolicy: what the driver itself refuses, and with what words. */}}

{{/* Whether the policy demands a digest: "true" or nothing. */}}
{{- define "csi-puzzlefs.admission.requireDigest" -}}
{{- $own := .Values.admissionPolicy.requireDigest }}
{{- if kindIs "bool" $own | ternary $own .Values.policy.requireDigest }}true{{ end }}
{{- end }}

{{/* The allow-list as a list of CEL strings; "[]" allows everything. */}}
{{- define "csi-puzzlefs.admission.registries" -}}
{{- $own := .Values.admissionPolicy.allowedRegistries }}
{{- kindIs "slice" $own | ternary $own .Values.policy.allowedRegistries | toJson }}
{{- end }}

{{/*
The two rules on variables.volumes, a list of {name, attributes}.

Short names get docker.io/ and library/ in front, as the driver reads them. A reference is cut at "@"
into the name, with or without a tag, and the digest. The allow-list is
matched on whole path components: "registry.example.com/team" allows ".../team", ".../team:v1" and
".../team/x", but not ".../teammates"; a host alone does not allow the same host with a port.
*/}}
{{- define "csi-puzzlefs.admission.rules" -}}
variables:
  - name: volumes
    expression: >-
      {{- .volumes | nindent 6 }}
  {{- if include "csi-puzzlefs.admission.requireDigest" .root }}
  - name: noDigest
    expression: >-
      variables.volumes.filter(v,
        !v.attributes[?'digest'].orValue('').matches('^(sha256|verity):[0-9a-f]{64}$') &&
        !v.attributes[?'image'].orValue('').matches('@sha256:[0-9a-f]{64}$')
      ).map(v, v.name)
  {{- end }}
  {{- $registries := include "csi-puzzlefs.admission.registries" .root }}
  {{- if ne $registries "[]" }}
  - name: allowed
    expression: >-
      {{ $registries }}
  - name: images
    expression: >-
      variables.volumes.map(v, v.attributes[?'image'].orValue('')).map(i,
        i == '' || i.matches('^([^/]*[.:A-Z][^/]*|localhost)/') ? i : 'docker.io/' + (i.contains('/') ? '' : 'library/') + i)
  - name: notAllowed
    expression: >-
      lists.range(variables.volumes.size()).filter(n, !variables.allowed.exists(a,
        variables.images[n].split('@')[0] == a ||
        variables.images[n].startsWith(a + '/') ||
        (a.contains('/') && variables.images[n].startsWith(a + ':'))
      )).map(n, variables.volumes[n].name + ' (' + variables.images[n] + ')')
  {{- end }}
validations:
  {{- if include "csi-puzzlefs.admission.requireDigest" .root }}
  - expression: variables.noDigest.size() == 0
    messageExpression: >-
      'PuzzleFS volume without a digest: ' + variables.noDigest.join(', ') +
      '; set the attribute digest to sha256:<64 hex> or verity:<64 hex> as build and push print them, or write image@sha256:<64 hex>'
    message: a PuzzleFS volume has no digest
    reason: Invalid
  {{- end }}
  {{- if ne $registries "[]" }}
  - expression: variables.notAllowed.size() == 0
    messageExpression: >-
      'PuzzleFS volume with an image that is not allowed here: ' + variables.notAllowed.join(', ') +
      '; allowed are: ' + variables.allowed.join(', ')
    message: the image of a PuzzleFS volume is from a registry that is not allowed here
    reason: Forbidden
  {{- end }}
{{- end }}

{{/* The binding of a policy. */}}
{{- define "csi-puzzlefs.admission.binding" -}}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ .name }}
  labels:
    {{- include "csi-puzzlefs.labels" .root | nindent 4 }}
spec:
  policyName: {{ .name }}
  validationActions:
    {{- toYaml .root.Values.admissionPolicy.validationActions | nindent 4 }}
{{- end }}
