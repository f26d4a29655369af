{{/*
Bytes of a share of a Kubernetes quantity, rounded down: {quantity, fraction, field}. A budget that
was read wrong is a pod that is killed, so what is not understood is refused.
*/}}
{{- define "certiq.bytes" -}}
{{- $text := toString .quantity -}}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$" $text) -}}
{{- fail (printf "%s: expected bytes such as 8Gi, 512Mi or 4G, got %q" .field $text) -}}
{{- end -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text -}}
{{- $factors := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000
    "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf $number (get $factors $unit) .fraction | floor | int64 -}}
{{- end -}}
