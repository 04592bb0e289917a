{{/* The chart's name in labels. */}}
{{- define "csi-puzzlefs.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The name of the objects: the release's, with the chart's unless it says so already. 50 characters leave room for what is put behind it. */}}
{{- define "csi-puzzlefs.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- $name := include "csi-puzzlefs.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Labels by which the DaemonSet finds its pods. They cannot change, so there is no version in them. */}}
{{- define "csi-puzzlefs.selectorLabels" -}}
app.kubernetes.io/name: {{ include "csi-puzzlefs.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "csi-puzzlefs.labels" -}}
{{ include "csi-puzzlefs.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: node-driver
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "csi-puzzlefs.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "csi-puzzlefs.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The reference of an image from a map of repository, tag and digest. */}}
{{- define "csi-puzzlefs.imageRef" -}}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository .tag }}
{{- end }}
{{- end }}

{{/* The image of the driver. */}}
{{- define "csi-puzzlefs.image" -}}
{{- include "csi-puzzlefs.imageRef" (dict "repository" .Values.image.repository "digest" .Values.image.digest "tag" (default .Chart.AppVersion .Values.image.tag)) }}
{{- end }}

{{/* The directory of the CSI socket, on the node and in the driver's container. */}}
{{- define "csi-puzzlefs.pluginDir" -}}
{{ .Values.kubeletRootDir }}/plugins/csi.puzzlefs.io
{{- end }}

{{/*
90% of the memory limit in bytes, or nothing where there is no limit: what the Go runtime may use
before it collects garbage harder. The rest is for what it does not count.
*/}}
{{- define "csi-puzzlefs.goMemLimit" -}}
{{- $limit := dig "limits" "memory" "" (default dict .Values.resources) | default "" | include "csi-puzzlefs.number" }}
{{- if regexMatch "^[0-9]+([kMGT]i?|Ki)?$" $limit }}
{{- $factors := dict "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "" 1 }}
{{- $unit := regexFind "[kKMGTi]+$" $limit }}
{{- if hasKey $factors $unit }}
{{- div (mul (regexFind "^[0-9]+" $limit | int64) (get $factors $unit) 9) 10 }}
{{- end }}
{{- end }}
{{- end }}
