{{/* {root, component, settings}: the pod of the StatefulSet and of the Deployment. */}}
{{- define "certiq.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $settings := .settings -}}
{{- $store := eq .component "store" -}}
metadata:
  labels:
    {{- include "certiq.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if or $settings.podAnnotations (include "certiq.edge" $root) }}
  annotations:
    {{- if include "certiq.edge" $root }}
    # Envoy reads its configuration once.
    checksum/edge: {{ include "certiq.edgeConfig" $root | sha256sum }}
    {{- end }}
    {{- with $settings.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
spec:
  serviceAccountName: {{ include "certiq.serviceAccountName" $root }}
  # The server never speaks to Kubernetes.
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (int $values.drain.delaySeconds) (int (ceil $values.drain.seconds)) (int $values.drain.graceSeconds) }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $settings.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $settings.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $settings.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $settings.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if not $store }}
  # Spread over nodes where there are several.
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "certiq.componentSelector" . | nindent 10 }}
  {{- end }}
  {{- if include "certiq.edge" $root }}
  initContainers:
    {{- include "certiq.edgeContainer" $root | nindent 4 }}
  {{- end }}
  containers:
    - name: certiq-server
      image: {{ include "certiq.image" $root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      ports:
        {{- if not (include "certiq.edge" $root) }}
        - name: grpc
          containerPort: 8470
        {{- end }}
        - name: metrics
          containerPort: 8471
      env:
        {{- include "certiq.environment" . | nindent 8 }}
      resources:
        {{- toYaml $settings.resources | nindent 8 }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ int $values.drain.delaySeconds }}
      startupProbe:
        {{- include "certiq.probe" $root | nindent 8 }}
        periodSeconds: 2
        failureThreshold: {{ div (add (int $values.probes.startupSeconds) 1) 2 }}
      readinessProbe:
        {{- include "certiq.probe" $root | nindent 8 }}
        periodSeconds: {{ $values.probes.periodSeconds }}
        failureThreshold: {{ $values.probes.failureThreshold }}
      livenessProbe:
        {{- include "certiq.probe" $root | nindent 8 }}
        periodSeconds: {{ $values.probes.periodSeconds }}
        failureThreshold: {{ mul 3 (int $values.probes.failureThreshold) }}
      {{- $mounts := include "certiq.mounts" . }}
      {{- with $mounts }}
      volumeMounts:
        {{- . | nindent 8 }}
      {{- end }}
  {{- $volumes := include "certiq.volumes" $root }}
  {{- with $volumes }}
  volumes:
    {{- . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "certiq.environment" -}}
{{- $values := .root.Values -}}
{{- $settings := .settings -}}
- name: CERTIQ_LISTEN
  value: {{ ternary "unix:/run/certiq/server.sock" "0.0.0.0:8470" (ne (include "certiq.edge" .root) "") | quote }}
- name: CERTIQ_METRICS_LISTEN
  value: "0.0.0.0:8471"
- name: CERTIQ_DATA_DIR
  value: {{ ternary "/var/lib/certiq/store" "" (eq .component "store") | quote }}
- name: CERTIQ_WORKERS
  {{- if $settings.workers }}
  value: {{ $settings.workers | int | quote }}
  {{- else }}
  # Rounded up to whole CPUs.
  valueFrom:
    resourceFieldRef:
      containerName: certiq-server
      resource: {{ ternary "limits.cpu" "requests.cpu" (ne (dig "limits" "cpu" "" $settings.resources | toString) "") }}
      divisor: "1"
  {{- end }}
- name: CERTIQ_QUEUE_LIMIT
  value: {{ $settings.queueLimit | int | quote }}
- name: CERTIQ_MEMORY_BUDGET_BYTES
  value: {{ include "certiq.bytes" (dict "quantity" $settings.resources.limits.memory "fraction" $values.memoryBudgetFraction "field" (printf "%s.resources.limits.memory" .component)) | quote }}
{{- if eq .component "store" }}
- name: CERTIQ_DISK_BUDGET_BYTES
  value: {{ include "certiq.bytes" (dict "quantity" $settings.persistence.size "fraction" $settings.persistence.diskBudgetFraction "field" "store.persistence.size") | quote }}
- name: CERTIQ_COMMIT_SECONDS
  value: {{ $settings.commitSeconds | toString | quote }}
{{- end }}
- name: CERTIQ_DRAIN_SECONDS
  value: {{ $values.drain.seconds | toString | quote }}
- name: CERTIQ_LOG_FORMAT
  value: {{ $values.log.format }}
- name: CERTIQ_REFLECTION
  value: {{ $values.reflection | toString | quote }}
{{- if $values.allowCleartext }}
- name: CERTIQ_ALLOW_CLEARTEXT
  value: "true"
{{- end }}
{{- if and $values.tls.secretName (not (include "certiq.edge" .root)) }}
- name: CERTIQ_TLS_CERT
  value: /etc/certiq/tls/tls.crt
- name: CERTIQ_TLS_KEY
  value: /etc/certiq/tls/tls.key
{{- end }}
{{- if and $values.tls.clientCASecretName (not (include "certiq.edge" .root)) }}
- name: CERTIQ_TLS_CLIENT_CA
  value: /etc/certiq/client-ca/ca.crt
{{- end }}
{{- if $values.tokens.secretName }}
- name: CERTIQ_TOKEN_FILE
  value: /etc/certiq/tokens/{{ $values.tokens.key }}
{{- end }}
{{- with $values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "certiq.probe" -}}
{{- $type := .Values.probes.type -}}
{{- if eq $type "auto" -}}
{{- $type = "grpc" -}}
{{- if include "certiq.edge" . -}}
{{- $type = "exec" -}}
{{- else if .Values.tls.secretName -}}
{{- $type = ternary "http" "exec" (ne .Values.tls.clientCASecretName "") -}}
{{- end -}}
{{- end -}}
{{- if eq $type "grpc" -}}
grpc:
  port: 8470
{{- else if eq $type "exec" -}}
exec:
  command: [certiq-server, --probe]
{{- else -}}
httpGet:
  path: /healthz
  port: metrics
{{- end }}
# The server's own --probe gives up after 5 s.
timeoutSeconds: 6
{{- end -}}

{{/* Whole folders, so that Kubernetes swaps renewed files in one go; the server sees it. */}}
{{- define "certiq.mounts" -}}
{{- $values := .root.Values -}}
{{- if eq .component "store" }}
- name: data
  mountPath: /var/lib/certiq
{{- end }}
{{- if include "certiq.edge" .root }}
- name: run
  mountPath: /run/certiq
{{- else }}
{{- include "certiq.tlsMounts" .root }}
{{- end }}
{{- if $values.tokens.secretName }}
- name: tokens
  mountPath: /etc/certiq/tokens
  readOnly: true
{{- end }}
{{- end -}}

{{/* Of who ends TLS: the edge, or else the server. */}}
{{- define "certiq.tlsMounts" -}}
{{- if .Values.tls.secretName }}
- name: tls
  mountPath: /etc/certiq/tls
  readOnly: true
{{- end }}
{{- if .Values.tls.clientCASecretName }}
- name: client-ca
  mountPath: /etc/certiq/client-ca
  readOnly: true
{{- end }}
{{- end -}}

{{- define "certiq.volumes" -}}
{{- if include "certiq.edge" . }}
- name: edge
  configMap:
    name: {{ include "certiq.fullname" . }}-edge
# The sockets of the server and of Envoy's own page.
- name: run
  emptyDir:
    sizeLimit: 1Mi
{{- end }}
{{- if .Values.tls.secretName }}
- name: tls
  secret:
    secretName: {{ .Values.tls.secretName }}
    defaultMode: 0440
{{- end }}
{{- if .Values.tls.clientCASecretName }}
- name: client-ca
  secret:
    secretName: {{ .Values.tls.clientCASecretName }}
    defaultMode: 0440
    items:
      - key: ca.crt
        path: ca.crt
{{- end }}
{{- if .Values.tokens.secretName }}
- name: tokens
  secret:
    secretName: {{ .Values.tokens.secretName }}
    defaultMode: 0440
{{- end }}
{{- end -}}
