{{/* The command line of the driver. What a value leaves at "no limit" is not passed. */}}
{{- define "csi-puzzlefs.args" -}}
- driver
- --endpoint=unix://{{ include "csi-puzzlefs.pluginDir" . }}/csi.sock
- --node-id=$(NODE_NAME)
- --state-dir={{ .Values.stateDir }}
- --kubelet-root-dir={{ .Values.kubeletRootDir }}
{{- if .Values.registrar.enabled }}
- --register=false
{{- end }}
- --http-endpoint=:{{ .Values.http.port }}
{{- if .Values.http.pprof }}
- --pprof
{{- end }}
- --log-level={{ .Values.log.level }}
- --log-format={{ .Values.log.format }}
- --pod-events={{ .Values.events.enabled }}
- --slow-pull={{ .Values.events.slowPull }}
- --require-digest={{ .Values.policy.requireDigest }}
{{- range .Values.policy.allowedRegistries }}
- --allowed-registries={{ . }}
{{- end }}
{{- range $file, $_ := .Values.policy.signatureKeys }}
- --signature-key=/etc/csi-puzzlefs/keys/{{ $file }}
{{- end }}
{{- with .Values.policy.maxImageSize }}
- --max-image-size={{ include "csi-puzzlefs.number" . }}
{{- end }}
{{- with .Values.policy.maxInodes }}
- --max-inodes={{ include "csi-puzzlefs.number" . }}
{{- end }}
- --metadata-memory={{ include "csi-puzzlefs.number" .Values.memory.metadata }}
- --content-cache={{ include "csi-puzzlefs.number" .Values.memory.contentCache }}
- --mount-options={{ join "," .Values.policy.mountOptions }}
{{- with .Values.store.quota }}
- --store-quota={{ include "csi-puzzlefs.number" . }}
{{- end }}
- --store-reserve={{ include "csi-puzzlefs.number" .Values.store.reserve }}
{{- if or .Values.registries.hosts .Values.registries.hostPath }}
- --certs-dir=/etc/csi-puzzlefs/certs.d
{{- end }}
{{- if .Values.registries.dockerConfigSecret }}
- --docker-config=/etc/csi-puzzlefs/docker/config.json
{{- end }}
{{- with .Values.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Helm reads numbers of YAML as floating point; 1e+07 is not what a flag takes. */}}
{{- define "csi-puzzlefs.number" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ int64 . }}{{ end }}
{{- end }}
