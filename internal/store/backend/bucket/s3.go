package bucket

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/logging"
	"gocloud.dev/blob/s3blob"

	"podstasis.dev/stasis/internal/store/backend"
)

// S3 is a bucket in S3, or in what speaks its protocol. Nothing is taken from the
// environment.
type S3 struct {
	Bucket, Prefix string
	Region         string // us-east-1 where a server has none
	Endpoint       string // the URL of a server that is not Amazon's
	PathStyle      bool   // the bucket in the path, not in the host name

	AccessKeyID, SecretAccessKey, SessionToken string

	HTTP *http.Client
}

// Open connects to nothing yet.
func (c S3) Open(ctx context.Context) (backend.Backend, error) {
	options := s3.Options{
		Region:                     c.Region,
		UsePathStyle:               c.PathStyle,
		HTTPClient:                 c.HTTP,
		Retryer:                    retryer(),
		Logger:                     logging.Nop{},
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenSupported,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, SessionToken: c.SessionToken, Source: "Secret"}, nil
		}),
		DisableLogOutputChecksumValidationSkipped: true,
	}
	if c.Endpoint != "" {
		options.BaseEndpoint = aws.String(c.Endpoint)
	}
	b, err := s3blob.OpenBucket(ctx, s3.New(options), c.Bucket, &s3blob.Options{RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported})
	if err != nil {
		return nil, fmt.Errorf("S3: %w", err)
	}
	return &bucket{blob: b, prefix: c.Prefix, place: "bucket " + c.Bucket}, nil
}

// retryer tries a request again a little, so that a part that is lost costs no more than
// itself. What lasts longer is the caller's.
func retryer() aws.Retryer {
	return retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts = 3
		untrusted := retry.IsErrorRetryableFunc(func(err error) aws.Ternary {
			var certificate *tls.CertificateVerificationError
			if errors.As(err, &certificate) {
				return aws.FalseTernary
			}
			return aws.UnknownTernary
		})
		o.Retryables = append([]retry.IsErrorRetryable{untrusted}, o.Retryables...)
	})
}
