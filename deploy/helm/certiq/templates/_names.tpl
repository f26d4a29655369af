{{- define "certiq.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* 40 characters leave room for -quantize-headless and the hashes of pods in 63. */}}
{{- define "certiq.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "certiq.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "certiq.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Of every pod of this release; component is added by "certiq.componentSelector". */}}
{{- define "certiq.selector" -}}
app.kubernetes.io/name: {{ include "certiq.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* {root, component}; never changes between versions: selectors are immutable. */}}
{{- define "certiq.componentSelector" -}}
{{ include "certiq.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "certiq.labels" -}}
{{ include "certiq.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "certiq.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "certiq.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* "true" or nothing: is Envoy before the server? */}}
{{- define "certiq.edge" -}}
{{- if eq (toString .Values.edge.enabled) "auto" -}}
{{- if .Values.tls.secretName -}}true{{- end -}}
{{- else if .Values.edge.enabled -}}true{{- end -}}
{{- end -}}

{{- define "certiq.edgeImage" -}}
{{- if .Values.edge.image.digest -}}
{{ .Values.edge.image.repository }}@{{ .Values.edge.image.digest }}
{{- else -}}
{{ .Values.edge.image.repository }}:{{ .Values.edge.image.tag }}
{{- end -}}
{{- end -}}

{{- define "certiq.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}
