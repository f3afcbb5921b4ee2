{{- define "patchclamp.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "patchclamp.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "patchclamp.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "patchclamp.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "patchclamp.selectorLabels" -}}
app.kubernetes.io/name: {{ include "patchclamp.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "patchclamp.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "patchclamp.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "patchclamp.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "patchclamp.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "patchclamp.image" -}}
{{- $variant := ternary "-cuda" "-cpu" (gt (int .Values.gpu.count) 0) -}}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s%s" .Chart.AppVersion $variant) .Values.image.tag) -}}
{{- end -}}

{{/* Artifacts in a volume that one node at a time can mount. */}}
{{- define "patchclamp.artifactsOnOneNode" -}}
{{- $p := .Values.artifacts.persistence -}}
{{- if and (not .Values.artifacts.url) $p.enabled (ne $p.accessMode "ReadWriteMany") -}}true{{- end -}}
{{- end -}}

{{/* A cache in a volume that one node at a time can mount. */}}
{{- define "patchclamp.cacheOnOneNode" -}}
{{- $p := .Values.cache.persistence -}}
{{- if and $p.enabled (ne $p.accessMode "ReadWriteMany") -}}true{{- end -}}
{{- end -}}

{{/* What the schema cannot say: values that contradict each other. */}}
{{- define "patchclamp.validate" -}}
{{- $many := or (gt (int .Values.replicaCount) 1) .Values.autoscaling.enabled -}}
{{- if and $many (not .Values.artifacts.url) (not .Values.artifacts.persistence.enabled) -}}
{{- fail "several replicas need artifacts that all of them see: set artifacts.url, or artifacts.persistence with accessMode ReadWriteMany" -}}
{{- end -}}
{{- if and $many (include "patchclamp.artifactsOnOneNode" .) -}}
{{- fail "artifacts.persistence.accessMode ReadWriteOnce serves one replica: set artifacts.url, or accessMode ReadWriteMany" -}}
{{- end -}}
{{- if and $many (include "patchclamp.cacheOnOneNode" .) -}}
{{- fail "cache.persistence.accessMode ReadWriteOnce serves one replica: use ReadWriteMany, or no cache.persistence" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and .Values.metrics.tls (not .Values.tls.enabled) -}}
{{- fail "metrics.tls needs the certificate of tls: set tls.enabled" -}}
{{- end -}}
{{- if and .Values.auth.enabled (not .Values.tls.enabled) (not .Values.auth.allowWithoutTLS) -}}
{{- fail "auth.enabled without tls.enabled sends tokens in plain text: enable tls, or set auth.allowWithoutTLS where a mesh encrypts" -}}
{{- end -}}
{{- end -}}
