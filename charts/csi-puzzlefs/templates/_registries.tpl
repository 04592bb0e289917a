{{/*
A key of a ConfigMap has no colons and no slashes, as hosts with ports and paths of files have: each
file gets a key made of a hash, and the projected volume puts it where it belongs.
*/}}
{{- define "csi-puzzlefs.certsKey" -}}
{{- printf "%s/%s" .host .file | sha256sum | trunc 16 }}
{{- end }}

{{/* Whether the ConfigMap of certs.d has anything in it. */}}
{{- define "csi-puzzlefs.certsFiles" -}}
{{- range $host, $config := .Values.registries.hosts }}
{{- if or $config.hostsToml $config.files }}yes{{ end }}
{{- end }}
{{- end }}

{{/* The volume that becomes the driver's --certs-dir. */}}
{{- define "csi-puzzlefs.certsVolume" -}}
- name: certs
  {{- if .Values.registries.hostPath }}
  hostPath:
    path: {{ .Values.registries.hostPath }}
    type: DirectoryOrCreate
  {{- else }}
  projected:
    sources:
      {{- if include "csi-puzzlefs.certsFiles" . }}
      - configMap:
          name: {{ include "csi-puzzlefs.fullname" . }}-certs
          items:
            {{- range $host, $config := .Values.registries.hosts }}
            {{- if $config.hostsToml }}
            - key: {{ include "csi-puzzlefs.certsKey" (dict "host" $host "file" "hosts.toml") | quote }}
              path: {{ printf "%s/hosts.toml" $host | quote }}
            {{- end }}
            {{- range $file, $_ := $config.files }}
            - key: {{ include "csi-puzzlefs.certsKey" (dict "host" $host "file" $file) | quote }}
              path: {{ printf "%s/%s" $host $file | quote }}
            {{- end }}
            {{- end }}
      {{- end }}
      {{- range $host, $config := .Values.registries.hosts }}
      {{- with $config.secret }}
      - secret:
          name: {{ .name }}
          items:
            {{- range .keys }}
            - key: {{ . | quote }}
              path: {{ printf "%s/%s" $host . | quote }}
            {{- end }}
      {{- end }}
      {{- end }}
  {{- end }}
{{- end }}
