{{/* Envoy's configuration: edge.yaml, but for the lines that values decide. */}}
{{- define "certiq.edgeConfig" -}}
{{- $text := .Files.Get "edge.yaml" -}}
{{- if .Values.tls.clientCASecretName -}}
{{- $text = replace "#client-ca# " "" $text -}}
{{- end -}}
{{- $heap := include "certiq.bytes" (dict "quantity" .Values.edge.resources.limits.memory "fraction" 0.75 "field" "edge.resources.limits.memory") -}}
{{- $text = regexReplaceAll "max_heap_size_bytes: [0-9]+" $text (printf "max_heap_size_bytes: %s" $heap) -}}
{{- regexReplaceAll "max_active_downstream_connections: [0-9]+" $text (printf "max_active_downstream_connections: %d" (int .Values.edge.maxConnections)) -}}
{{- end -}}

{{/*
A sidecar, which starts before the server and ends after it: streams that drain would be cut by an
Envoy that ends with them.
*/}}
{{- define "certiq.edgeContainer" -}}
{{- $values := .Values -}}
- name: edge
  restartPolicy: Always
  image: {{ include "certiq.edgeImage" . | quote }}
  imagePullPolicy: {{ $values.edge.image.pullPolicy }}
  command: [/usr/local/bin/envoy]
  args:
    - --config-path
    - /etc/certiq/edge/edge.yaml
    - --concurrency
    - {{ int $values.edge.threads | quote }}
    - --log-level
    - warning
    # Shared memory is for an Envoy that follows another in one container.
    - --disable-hot-restart
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities:
      drop: [ALL]
  ports:
    - name: grpc
      containerPort: 8470
  resources:
    {{- toYaml $values.edge.resources | nindent 4 }}
  # It listens once it has read the certificate. The server's health is its own container's to say.
  startupProbe:
    tcpSocket:
      port: 8470
    periodSeconds: 2
    failureThreshold: 30
  readinessProbe:
    tcpSocket:
      port: 8470
    periodSeconds: {{ $values.probes.periodSeconds }}
    failureThreshold: {{ $values.probes.failureThreshold }}
  volumeMounts:
    - name: edge
      mountPath: /etc/certiq/edge
      readOnly: true
    - name: run
      mountPath: /run/certiq
    {{- include "certiq.tlsMounts" . | nindent 4 }}
{{- end -}}
