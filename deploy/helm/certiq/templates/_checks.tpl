{{/* What the schema cannot say, or not with a reason. */}}
{{- define "certiq.checks" -}}
{{- if gt (int .Values.store.replicas) 1 -}}
{{- fail (printf "store.replicas: expected 0 or 1, got %d. Calibrations and jobs live in one server's data directory; replicas do not share one yet, so a second one would not know the calibrations and jobs of the first. Quantize needs none of them: scale quantize.replicas or quantize.autoscaling." (int .Values.store.replicas)) -}}
{{- end -}}
{{- if not (or .Values.store.enabled .Values.quantize.enabled) -}}
{{- fail "store.enabled and quantize.enabled: expected at least one to be true" -}}
{{- end -}}
{{- if and (not .Values.tls.secretName) (not .Values.allowCleartext) -}}
{{- fail "tls.secretName: expected the name of a secret with tls.crt and tls.key. Set allowCleartext=true to serve clear text to the cluster's network instead." -}}
{{- end -}}
{{- if and .Values.tls.secretName .Values.allowCleartext -}}
{{- fail "allowCleartext: expected false where tls.secretName is set; a server speaks one of both" -}}
{{- end -}}
{{- if and .Values.tls.clientCASecretName (not .Values.tls.secretName) -}}
{{- fail "tls.clientCASecretName: client certificates take TLS, expected tls.secretName to be set as well" -}}
{{- end -}}
{{- if and (include "certiq.edge" .) (not .Values.tls.secretName) -}}
{{- fail "edge.enabled: expected auto or false where tls.secretName is not set; the edge is where TLS ends" -}}
{{- end -}}
{{- if and (include "certiq.edge" .) (not (dig "limits" "memory" "" .Values.edge.resources)) -}}
{{- fail "edge.resources.limits.memory: expected to be set, Envoy's heap is a share of it" -}}
{{- end -}}
{{- if and (eq .Values.probes.type "grpc") .Values.tls.secretName -}}
{{- fail "probes.type: expected auto, exec or http with TLS; Kubernetes' gRPC probes speak clear text only" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) .Values.serviceAccount.annotations -}}
{{- fail "serviceAccount.annotations: expected none where serviceAccount.create is false" -}}
{{- end -}}
{{- if and .Values.quantize.service.headless (ne .Values.quantize.service.type "ClusterIP") -}}
{{- fail (printf "quantize.service.headless: expected false where quantize.service.type is %s" .Values.quantize.service.type) -}}
{{- end -}}
{{- $auto := .Values.quantize.autoscaling -}}
{{- if $auto.enabled -}}
{{- if lt (int $auto.maxReplicas) (int $auto.minReplicas) -}}
{{- fail (printf "quantize.autoscaling.maxReplicas: expected minReplicas (%d) or more, got %d" (int $auto.minReplicas) (int $auto.maxReplicas)) -}}
{{- end -}}
{{- if not (or $auto.cpuUtilization $auto.queueDepth) -}}
{{- fail "quantize.autoscaling: expected cpuUtilization or queueDepth to be above 0" -}}
{{- end -}}
{{- if and $auto.cpuUtilization (not (dig "requests" "cpu" "" .Values.quantize.resources)) -}}
{{- fail "quantize.resources.requests.cpu: expected to be set, cpuUtilization is a share of it" -}}
{{- end -}}
{{- end -}}
{{- range $component := list "store" "quantize" -}}
{{- $resources := (index $.Values $component).resources -}}
{{- if not (dig "limits" "memory" "" $resources) -}}
{{- fail (printf "%s.resources.limits.memory: expected to be set, the memory budget is a share of it" $component) -}}
{{- end -}}
{{- if not (or (dig "limits" "cpu" "" $resources) (dig "requests" "cpu" "" $resources) (index $.Values $component).workers) -}}
{{- fail (printf "%s.workers: expected more than 0 where %s.resources has neither a limit nor a request of CPU" $component $component) -}}
{{- end -}}
{{- end -}}
{{- end -}}
